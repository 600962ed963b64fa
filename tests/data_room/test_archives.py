"""Archives read in place: the bytes that went in come out, and entries that would leave are refused."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from appo.data.archives import list_entries, read_entry
from appo.data.assemble import assemble
from appo.data.manifest import read_manifest
from appo.data.media import MediaMissing, MediaRoot, RootError
from appo.storage import StorageError, UnsafePath
from tests.data_room.clips import write_clip
from tests.data_room.recipes import question, recipe_of, write_jsonl

MEMBERS = {
    f"videos/{name}": np.random.default_rng(i).bytes(5000 + i) for i, name in enumerate(["a", "b ü", "c"])
}


def make_zip(path: Path, members: dict[str, bytes], *, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def make_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["stored zip", "deflated zip", "tar"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    path = {
        "stored zip": lambda: make_zip(tmp_path / "a.zip", MEMBERS, method=zipfile.ZIP_STORED),
        "deflated zip": lambda: make_zip(tmp_path / "a.zip", MEMBERS),
        "tar": lambda: make_tar(tmp_path / "a.tar", MEMBERS),
    }[kind]()
    entries = list(list_entries(str(path)))
    assert {entry.name: read_entry(entry) for entry in entries} == MEMBERS
    assert entries[0].uri == f"{path}!/videos/a"


@pytest.mark.parametrize("name", ["../evil.mp4", "/etc/evil.mp4", "a/../../evil.mp4", "..\\evil.mp4"])
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_entries_that_leave_are_refused(tmp_path: Path, make, name: str) -> None:
    path = make(tmp_path / ("a.zip" if make is make_zip else "a.tar"), {"good": b"1", name: b"evil"})
    with pytest.raises(UnsafePath, match=str(path.name)):
        list(list_entries(str(path)))


def test_links_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("link.mp4")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("link.mp4")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for name in ("a.zip", "a.tar"):
        with pytest.raises(UnsafePath, match=r"link\.mp4.*refused"):
            list(list_entries(str(tmp_path / name)))


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", MEMBERS, method=zipfile.ZIP_STORED)
    entries = list(list_entries(str(path)))
    data = bytearray(path.read_bytes())
    data[entries[1].offset + 1000] ^= 255
    path.write_bytes(data)
    assert read_entry(entries[0]) == MEMBERS["videos/a"]
    with pytest.raises(StorageError, match=r"a\.zip!/videos/b ü: does not match its checksum"):
        read_entry(entries[1])
    path.write_bytes(data[: entries[2].offset + 100])
    with pytest.raises(StorageError, match="ends after"):
        read_entry(entries[2])
    with pytest.raises(StorageError, match="not a readable archive"):
        list(list_entries(str(path)))


def test_zip_bomb_unpacks_no_further_than_declared(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "a.zip", {"bomb": bytes(10 << 20)})
    (entry,) = list_entries(str(path))
    from dataclasses import replace

    with pytest.raises(StorageError, match="checksum"):
        read_entry(replace(entry, size=1000))


def test_compressed_tar_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar.gz", MEMBERS, "w:gz")
    with pytest.raises(StorageError, match=r"pack it again as \.tar"):
        list(list_entries(str(path)))


def test_publishers_layout_of_archives_beside_records(tmp_path: Path) -> None:
    """`STAR/STAR_part1.zip` holds what records call `./STAR/x.mp4`, with or without the folder in front."""
    root = tmp_path / "root"
    (root / "STAR").mkdir(parents=True)
    make_zip(root / "STAR" / "STAR_part1.zip", {"Charades/1.mp4": b"one"})
    make_tar(root / "STAR" / "STAR_part2.tar", {"STAR/Charades/2.mp4": b"two"})
    (root / "STAR" / "3.mp4").write_bytes(b"three")
    media = MediaRoot(root)
    for name, data in {
        "STAR/Charades/1.mp4": b"one", "./STAR/Charades/2.mp4": b"two", "STAR/3.mp4": b"three"
    }.items():  # fmt: skip
        assert media.find(name).read() == data
    with pytest.raises(MediaMissing, match="nor an entry of the 2 archives"):
        media.find("STAR/Charades/4.mp4")
    with pytest.raises(UnsafePath):
        media.find("STAR/../../etc/passwd")


def test_an_ambiguous_end_is_no_match(tmp_path: Path) -> None:
    root = tmp_path / "a.zip"
    make_zip(
        root, {"train/videos/1.mp4": b"one", "train/videos/2.mp4": b"two", "test/videos/2.mp4": b"other"}
    )
    media = MediaRoot(root)
    assert media.find("videos/1.mp4").read() == b"one"
    assert media.find("1.mp4").read() == b"one"
    assert media.find("train/videos/2.mp4").read() == b"two"
    with pytest.raises(MediaMissing):
        media.find("videos/2.mp4")


def test_broken_or_hostile_archive_stops_the_run(tmp_path: Path) -> None:
    """Not thousands of rejects, one for each video that might have been in it."""
    annotations = write_jsonl(tmp_path / "q.jsonl", [question(f"{i}.mp4") for i in range(3)])
    make_zip(tmp_path / "evil.zip", {"../evil.mp4": b"1"})
    (tmp_path / "cut.zip").write_bytes(make_zip(tmp_path / "good.zip", MEMBERS).read_bytes()[:-30])
    for root, words in {
        "evil.zip": "climb out",
        "cut.zip": r"cut\.zip: is not a readable archive",
        "none": r"none: no such folder or archive; set data\.root",
    }.items():
        recipe = recipe_of(tmp_path, f"data.annotations={annotations}", f"data.root={tmp_path / root}")
        with pytest.raises(RootError, match=words):
            assemble(recipe, tmp_path / "out", progress=False)


def test_truncated_tar_is_noticed(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", MEMBERS)
    path.write_bytes(path.read_bytes()[:9000])  # in the middle of a member
    with pytest.raises(StorageError, match=r"a\.tar: is not a readable archive"):
        list(list_entries(str(path)))


@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
def test_capital_letters_of_a_suffix_do_not_matter(tmp_path: Path, place: str) -> None:
    """Perception Test ships `.MP4` for some records' `.mp4`, and so may any publisher, in a folder or an archive."""
    names = {"a/one.MP4": b"1", "two.webm": b"2", "three.Mkv": b"3", "both.mp4": b"4", "both.MP4": b"5"}
    root = tmp_path / {"folder": "root", "zip": "A.ZIP", "tar": "A.Tar"}[place]
    if place == "folder":
        for name, data in names.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
    else:
        (make_zip if place == "zip" else make_tar)(root, names)
    media = MediaRoot(root)
    asked = {"a/one.mp4": b"1", "two.WEBM": b"2", "three.Mkv": b"3", "both.mp4": b"4", "both.MP4": b"5"}
    assert {name: media.find(name).read() for name in asked} == asked
    assert [name for name, _ in media.files((".mp4", ".webm"))] == [
        "a/one.MP4",
        "both.MP4",
        "both.mp4",
        "two.webm",
    ]
    with pytest.raises(MediaMissing):
        media.find("a/ONE.mp4")  # the rest of a name is another name


def test_a_name_that_no_disk_can_hold_is_missing(tmp_path: Path) -> None:
    for name in ("x" * 300 + ".mp4", "/".join(["long"] * 2000) + ".mp4"):
        with pytest.raises(MediaMissing, match="too long"):
            MediaRoot(tmp_path).find(name)


def test_assembly_from_an_archive_equals_assembly_from_files(tmp_path: Path) -> None:
    clips = {f"{i}.mp4": write_clip(tmp_path / "clips" / f"{i}.mp4", seed=i).read_bytes() for i in range(4)}
    make_zip(tmp_path / "clips.zip", clips)
    annotations = write_jsonl(tmp_path / "q.jsonl", [question(name) for name in clips])
    results = []
    for root in ("clips", "clips.zip"):
        recipe = recipe_of(tmp_path, f"data.annotations={annotations}", f"data.root={tmp_path / root}")
        done = assemble(recipe, tmp_path / f"out-{root}", progress=False)
        results.append([s.to_json() for s in read_manifest(done.manifest).samples])
        shards = sorted(p.name for p in (tmp_path / f"out-{root}").rglob("*.parquet"))
        results.append(shards)
    assert results[0] == results[2]
    assert results[1] == results[3]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["clips", "out-clips", "out-clips.zip"]
