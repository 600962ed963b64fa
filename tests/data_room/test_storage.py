"""Local storage: whole files or none, and no path that leaves its folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.storage import StorageError, UnsafePath, fetch, inside, read_bytes, safe_relative, write_atomic


def test_write_creates_folders_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file"
    write_atomic(target, "grüße")
    write_atomic(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(target.parent) == ["file"]
    assert target.stat().st_mode & 0o777 == 0o644  # other pods and users read it


def test_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_fetch_of_a_missing_file_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none: cannot be opened"):
        fetch(tmp_path / "none", tmp_path / "folder" / "copy")
    assert os.listdir(tmp_path / "folder") == []
    write_atomic(tmp_path / "some", b"data")
    assert read_bytes(fetch(tmp_path / "some", tmp_path / "folder" / "copy")) == b"data"


@given(name=st.text(alphabet="ab./\\:~ \x00ü", max_size=12))
def test_no_name_leaves_the_root(name: str) -> None:
    """Whatever is accepted stays inside, by arithmetic of paths."""
    try:
        relative = safe_relative(name)
    except UnsafePath:
        return
    assert not os.path.isabs(relative)
    assert os.path.normpath(f"/root/{relative}").startswith("/root/")


def test_ordinary_names_are_accepted() -> None:
    assert safe_relative("./a//b c/ü (1).mp4") == "a/b c/ü (1).mp4"
    assert safe_relative("..a/b..mp4") == "..a/b..mp4"


def test_links_inside_are_followed_and_links_out_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (root / "real" / "v.mp4").write_bytes(b"1")
    (root / "alias").symlink_to(root / "real")
    (root / "out").symlink_to(tmp_path)
    assert inside(root, "alias/v.mp4").read_bytes() == b"1"
    with pytest.raises(UnsafePath, match="leads out"):
        inside(root, "out/v.mp4")
