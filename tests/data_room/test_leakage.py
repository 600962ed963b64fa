"""Videos that training and test sets share: found by content whatever their name, and by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from appo.data.assemble import assemble
from appo.data.leakage import LeakageError, stem, test_videos
from tests.data_room.clips import write_clip
from tests.data_room.recipes import question, recipe_of, write_jsonl
from tests.data_room.test_archives import make_tar, make_zip

test_videos.__test__ = False  # type: ignore[attr-defined]  # a function under test, not a test


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for index in range(4):
        write_clip(tmp_path / "root" / f"video_{index}.mp4", seed=index)
    return tmp_path / "root"


def report(root: Path, tmp_path: Path, lists: dict[str, Path]) -> list[tuple[str, str, str, str, int]]:
    records = [question(f"video_{index}.mp4") for index in range(4)]
    records.append(question("video_1.mp4", id="second", question="Also?"))
    annotations = write_jsonl(tmp_path / "q.jsonl", records)
    places = json.dumps({name: str(path) for name, path in lists.items()})
    recipe = recipe_of(
        tmp_path, f"data.annotations={annotations}", f"data.root={root}", f"data.leakage={places}"
    )
    done = assemble(recipe, tmp_path / "out", progress=False)
    found = json.loads(done.leakage.read_text())
    assert set(found["compared"]) == set(lists)
    assert ("None." in done.card.read_text()) or found["leaks"]
    return [(k["benchmark"], k["by"], k["video"], k["benchmark_video"], k["samples"]) for k in found["leaks"]]


def test_folder_is_compared_by_content_and_name(root: Path, tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    bench.mkdir()
    shutil.copy(root / "video_1.mp4", bench / "renamed.mp4")
    write_clip(bench / "video_2.mp4", seed=99)  # the same name, another video
    assert report(root, tmp_path, {"mvbench": bench}) == [
        ("mvbench", "content", "video_1.mp4", "renamed.mp4", 2),
        ("mvbench", "name", "video_2.mp4", "video_2.mp4", 1),
    ]


def test_archives_are_compared_by_content(root: Path, tmp_path: Path) -> None:
    """A benchmark as it was downloaded: one archive, or a folder with archives and videos beside each other."""
    clip, other = (
        (root / "video_1.mp4").read_bytes(),
        write_clip(tmp_path / "other.mp4", seed=99).read_bytes(),
    )
    make_zip(tmp_path / "bench.zip", {"videos/renamed.MP4": clip, "readme.txt": clip})
    make_tar(tmp_path / "folder" / "star" / "part.tar", {"deep/x.mp4": other, "deep/video_2.mp4": other})
    (tmp_path / "folder" / "loose.MP4").write_bytes((root / "video_3.mp4").read_bytes())
    places = {"archive": tmp_path / "bench.zip", "folder": tmp_path / "folder"}
    assert report(root, tmp_path, places) == [
        ("archive", "content", "video_1.mp4", "videos/renamed.MP4", 2),
        ("folder", "name", "video_2.mp4", "star/deep/video_2.mp4", 1),
        ("folder", "content", "video_3.mp4", "loose.MP4", 1),
    ]


def test_place_without_videos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8")
    with pytest.raises(LeakageError, match="holds no videos; they end in"):
        test_videos(str(tmp_path))
    with pytest.raises(LeakageError, match=r"photo\.jpg: is no list of names"):
        test_videos(str(tmp_path / "photo.jpg"))


def test_manifest_is_compared_by_content(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(root / "video_3.mp4", other / "theirs.mp4")
    annotations = write_jsonl(other / "q.jsonl", [question("theirs.mp4")])
    assemble(recipe_of(tmp_path, f"data.annotations={annotations}"), tmp_path / "bench", progress=False)
    assert report(root, tmp_path, {"b": tmp_path / "bench"}) == [
        ("b", "content", "video_3.mp4", "theirs.mp4", 1)
    ]


def test_lists_of_names_in_their_forms(root: Path, tmp_path: Path) -> None:
    lists = {
        "csv": ("ids.csv", "video_id,question\nvideo_0,why\n"),
        "json": ("ids.json", json.dumps({"video_0": {}, "video_9": {}})),
        "jsonl": ("ids.jsonl", json.dumps({"video_name": "x/video_0.mp4"}) + "\n"),
        "text": ("ids.txt", "video_0\nvideo_7\n"),
    }
    for name, text in lists.values():
        (tmp_path / name).write_text(text)
    leaks = report(root, tmp_path, {key: tmp_path / name for key, (name, _) in lists.items()})
    assert [(b, by, v, n) for b, by, v, _, n in leaks] == [
        (b, "name", "video_0.mp4", 1) for b in sorted(lists)
    ]


def test_no_leak_is_an_empty_list(root: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("video_77\n")
    assert report(root, tmp_path, {"b": tmp_path / "ids.txt"}) == []


def test_list_without_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("question\nwhy\n")
    with pytest.raises(LeakageError, match="holds no video names"):
        test_videos(str(tmp_path / "ids.csv"))


def test_stems() -> None:
    assert stem("./STAR/Charades/XY12.mp4") == "XY12"
    assert stem("1150/6233408665.MP4") == "6233408665"
    assert stem("v1.5") == "v1.5"
