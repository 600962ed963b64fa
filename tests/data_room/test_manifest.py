"""The manifest: what is written is what is read, and errors name the line."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.data.manifest import ManifestError, read_manifest, relative_place, write_manifest
from appo.data.schema import VideoSample

HEADER = {"name": "n", "root": "videos"}
words = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())
samples = st.builds(
    VideoSample,
    id=words,
    source=words,
    problem_type=st.sampled_from(["multiple choice", "temporal grounding"]),
    question=words,
    answer=st.just("B"),
    options=st.lists(words, min_size=2, max_size=5).map(tuple),
    video=words,
    split=st.sampled_from(["train", "test", "warm_start"]),
    duration_s=st.none() | st.floats(0.1, 1e5),
    key_times=st.lists(st.tuples(st.floats(0, 5), st.floats(6, 9)), max_size=2).map(tuple),
)


@given(rows=st.lists(samples, max_size=5, unique_by=lambda sample: sample.id))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[VideoSample]) -> None:
    """Any text, line separators of Unicode included, and any number."""
    path = tmp_path_factory.mktemp("m") / "manifest.jsonl"
    written = write_manifest(path, rows, **HEADER)
    read = read_manifest(path)
    assert read.samples == tuple(rows)
    assert read.header == written.header
    assert read.digest == written.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.read_bytes().count(b"\n") == len(rows) + 1


def one(ident: str = "1", **changes: str) -> VideoSample:
    return VideoSample(ident, "s", "free-form", "q", "a", video="v.mp4", **changes)  # type: ignore[arg-type]


def test_splits_and_places(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", [one("1"), one("2", split="test")], **HEADER)
    assert [s.id for s in manifest.split("test")] == ["2"]
    with pytest.raises(ManifestError, match="split 'tests'"):
        manifest.split("tests")
    assert manifest.root == str(tmp_path / "videos")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v.mp4").write_bytes(b"1")
    assert manifest.locate(manifest.samples[0]) == str(tmp_path / "videos" / "v.mp4")
    assert read_manifest(tmp_path).digest == manifest.digest  # the folder stands for the file in it


def test_places_are_relative_below_the_manifest_only(tmp_path: Path) -> None:
    assert relative_place(tmp_path / "out" / "videos", tmp_path / "out") == "videos"
    assert relative_place(tmp_path / "data", tmp_path / "out") == str(tmp_path / "data")
    assert relative_place("s3://bucket/x", tmp_path) == "s3://bucket/x"


def test_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    with pytest.raises(ManifestError, match="no such manifest"):
        read_manifest(path)
    write_manifest(path, [one()], **HEADER)
    good = path.read_text()
    for text, words in {
        "": "is empty",
        good.replace("appo.manifest", "other"): 'line 1: first line must be a header with "kind"',
        good.replace('"version":1', '"version":9'): "line 1: version=9",
        good + "{": "line 3",
        good + json.dumps({"id": "2", "colour": "red"}) + "\n": "line 3: colour='red': unknown field",
        good + good.split("\n")[1] + "\n": "line 3: id '1' appears twice",
        good.replace('"answer":"a",', ""): "line 2: record 1",
    }.items():
        path.write_text(text)
        with pytest.raises(ManifestError, match=words):
            read_manifest(path)


def test_duplicate_ids_are_never_written(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="appears twice"):
        write_manifest(tmp_path / "manifest.jsonl", [one(), one()], **HEADER)
    assert list(tmp_path.iterdir()) == []


def test_reading_a_manifest_needs_no_heavy_library() -> None:
    code = (
        "import sys, appo.data.manifest, appo.data.frames, appo.data.assemble\n"
        "heavy = {'torch', 'decord', 'av', 'boto3', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
