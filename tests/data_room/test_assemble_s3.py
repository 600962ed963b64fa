"""From records and a zip in S3 to shards in S3, and training's view of them, without a file on this disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from appo import objectstore, storage
from appo.data.assemble import assemble
from appo.data.frames import open_frames
from appo.data.manifest import read_manifest
from appo.data.video import decode_video
from appo.storage import StoreError
from tests.data_room.clips import write_clip
from tests.data_room.recipes import question, recipe_of
from tests.data_room.stores import Fault, FaultyProxy
from tests.data_room.test_archives import make_zip

pytestmark = pytest.mark.slow


def test_everything_in_the_store(s3: FaultyProxy, tmp_path: Path) -> None:
    clips = {
        f"videos/{i}.mp4": write_clip(tmp_path / "clips" / f"{i}.mp4", seed=i).read_bytes() for i in range(6)
    }
    archive = make_zip(tmp_path / "source.zip", clips)
    objectstore.put_file("s3://data/raw/Source/part1.zip", archive)
    records = [question(f"Source/{name}") for name in clips] + [question("Source/videos/none.mp4")]
    lines = "".join(json.dumps(r) + "\n" for r in records)
    storage.write("s3://data/raw/questions.jsonl", lines)
    recipe = recipe_of(
        tmp_path,
        "data.annotations=s3://data/raw/questions.jsonl",
        "data.root=s3://data/raw",
        "data.cache_dir=s3://data/cache",
    )
    # A store that stumbles now and then changes nothing.
    s3.faults.append(Fault("error500", lambda method, path: method == "GET", times=2))
    s3.faults.append(Fault("reset", lambda method, path: "part1.zip" in path, times=2, after_bytes=3000))
    done = assemble(recipe, tmp_path / "out", progress=False)
    manifest = read_manifest(done.manifest)
    assert len(manifest.samples) == 6
    assert manifest.root == "s3://data/raw"
    assert str(manifest.frames).startswith("s3://data/cache/")
    (reject,) = map(json.loads, done.rejects.read_text().splitlines())
    assert "no such file, nor an entry of the 1 archives" in reject["reason"]
    assert not list((tmp_path / "out").rglob("*.parquet"))
    assert not list((tmp_path / "out").rglob("*.mp4"))

    frames = open_frames(manifest, recipe)
    for sample in manifest.samples:
        assert manifest.locate(sample) == f"s3://data/raw/Source/part1.zip!/{str(sample.video)[7:]}"
        direct = decode_video(tmp_path / "clips" / Path(str(sample.video)).name, recipe.video)
        np.testing.assert_array_equal(frames.load(sample).frames, direct.frames)

    # Another pod, an empty disk: nothing is decoded again, no video is read, and the manifest is the same.
    s3.requests.clear()
    again = assemble(recipe, tmp_path / "other", progress=False)
    assert again.manifest.read_bytes() == done.manifest.read_bytes()
    assert not any(method == "PUT" for method, _, _ in s3.requests)
    # Of the archive, its directory is read and not one video: those start at its first bytes.
    spans = [span for method, path, span in s3.requests if method == "GET" and "part1.zip" in path]
    assert all(int(span.removeprefix("bytes=").split("-")[0]) > 0 for span in spans)


def test_a_store_that_fails_stops_the_run_and_rejects_nothing(s3: FaultyProxy, tmp_path: Path) -> None:
    """Which videos a store's bad minute hits must not decide what is trained on."""
    for index in range(3):
        objectstore.put_file(f"s3://data/bad/{index}.mp4", write_clip(tmp_path / f"{index}.mp4", seed=index))
    storage.write("s3://data/bad/q.jsonl", "".join(json.dumps(question(f"{i}.mp4")) + "\n" for i in range(3)))
    recipe = recipe_of(tmp_path, "data.annotations=s3://data/bad/q.jsonl")
    s3.faults.append(Fault("error500", lambda method, path: "1.mp4" in path, times=10**6))
    with pytest.raises(
        StoreError, match=r"1\.mp4: .*HTTP 503.* after 6 attempts; nothing is rejected for that"
    ):
        assemble(recipe, tmp_path / "out", progress=False)
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    s3.faults.clear()
    again = assemble(recipe, tmp_path / "out", progress=False)
    assert (
        again.manifest.read_bytes()
        == assemble(recipe, tmp_path / "new", progress=False).manifest.read_bytes()
    )
    assert again.rejects.read_text() == ""


def test_objects_are_compared_by_content_and_found_with_capital_suffixes(
    s3: FaultyProxy, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "v.mp4")
    objectstore.put_file("s3://data/capital/v.MP4", clip)
    objectstore.put_file(
        "s3://data/bench/parts/a.zip", make_zip(tmp_path / "a.zip", {"x.mp4": clip.read_bytes()})
    )
    storage.write("s3://data/capital/q.jsonl", json.dumps(question("v.mp4")) + "\n")
    recipe = recipe_of(
        tmp_path, "data.annotations=s3://data/capital/q.jsonl", "data.leakage={bench: s3://data/bench}"
    )
    done = assemble(recipe, tmp_path / "out", progress=False)
    assert len(read_manifest(done.manifest).samples) == 1
    (leak,) = json.loads(done.leakage.read_text())["leaks"]
    assert (leak["by"], leak["benchmark_video"]) == ("content", "parts/x.mp4")


def test_videos_as_objects_and_decoding_on_the_fly(s3: FaultyProxy, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "v.mp4")
    objectstore.put_file("s3://data/loose/ordner ü/v.mp4", clip)
    storage.write("s3://data/loose/q.jsonl", json.dumps(question("ordner ü/v.mp4")) + "\n")
    recipe = recipe_of(tmp_path, "data.annotations=s3://data/loose/q.jsonl", "data.cache=none")
    manifest = read_manifest(assemble(recipe, tmp_path / "out", progress=False).manifest)
    assert manifest.root == "s3://data/loose"
    loaded = open_frames(manifest, recipe).load(manifest.samples[0])
    np.testing.assert_array_equal(loaded.frames, decode_video(clip, recipe.video).frames)
