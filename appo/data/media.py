"""A sample's path and the data root -> the bytes of its video or image, wherever they lie.

The root is a folder, one archive, or an S3 prefix or archive. Publishers ship folders of zips next to one
another (`STAR/STAR_part1.zip` holds what the records call `./STAR/...`): a path that is no file below the
root is looked up in the archives there. Paths out of records are hostile until checked (see
`appo.storage.safe_relative`).
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from appo.data.archives import Entry, is_archive, list_entries, read_entry
from appo.data.clips import folder_sha256, folder_stamp, is_frame_folder
from appo.storage import (
    StorageError,
    UnsafePath,
    inside,
    is_s3,
    open_binary,
    read_bytes,
    safe_relative,
    sha256_file,
)


class MediaMissing(StorageError):
    """A path that names no file of the data root."""


class RootError(StorageError):
    """The data root itself, or an archive in it, cannot be read: nothing would be found, so nothing is tried."""


@dataclass(frozen=True, slots=True)
class Medium:
    """Where one file's bytes are; small, so that it can be sent to a worker. stamp: changes with the
    contents. data: the bytes themselves, once they were fetched.
    """

    uri: str
    stamp: str
    local: Path | None = None
    entry: Entry | None = None
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        return read_entry(self.entry) if self.entry is not None else read_bytes(self.local or self.uri)

    def open(self) -> BinaryIO:
        return open_binary(self.local) if self.local is not None else io.BytesIO(self.read())

    def sha256(self) -> str:
        assert self.local is not None
        return folder_sha256(self.local) if self.local.is_dir() else sha256_file(self.local)


class MediaRoot:
    """Finds files below `root`; listings of archives and prefixes are made once, when first needed."""

    def __init__(self, root: str | Path):
        self.root = str(root).rstrip("/") if is_s3(root) else os.path.abspath(root)

    def check(self) -> None:
        """Raises RootError when there is nothing to look in."""
        if not is_s3(self.root) and not os.path.exists(self.root):
            raise RootError(f"{self.root}: no such folder or archive; set data.root to where the videos are")
        if is_s3(self.root) and not is_archive(self.root) and not self._objects:
            raise RootError(f"{self.root}: holds no objects; set data.root to where the videos are")

    def locate(self, name: str) -> str:
        """Path or URI (`archive!/entry` inside archives) of a record's path."""
        return self.find(name).uri

    def find(self, name: str) -> Medium:
        """Raises UnsafePath for a path that leaves the root, MediaMissing for one that names no file, RootError
        when an archive that may hold it cannot be read.
        """
        relative = safe_relative(name)
        if not is_archive(self.root):
            if is_s3(self.root):
                if found := self._objects.get(relative):
                    return Medium(f"{self.root}/{relative}", found)
            else:
                path = _whatever_case(inside(Path(self.root), relative))
                if path.is_file():
                    status = path.stat()
                    return Medium(str(path), f"{status.st_size}-{status.st_mtime_ns}", local=path)
                if is_frame_folder(path):
                    return Medium(str(path), folder_stamp(path), local=path)
                if path.exists():
                    raise MediaMissing(f"{path}: is not a regular file")
        if entry := self._find_entry(relative):
            return Medium(entry.uri, f"{entry.size}-{entry.crc32 or 0:08x}", entry=entry)
        raise MediaMissing(f"{self.root}/{relative}: no such file{self._searched()}")

    def _searched(self) -> str:
        count = len(self._archives)
        return f", nor an entry of the {count} archives there" if count else ""

    @cached_property
    def _objects(self) -> dict[str, str]:
        """Relative key -> ETag of every object below an S3 root."""
        from appo.objectstore import list_objects

        try:
            return dict(list_objects(self.root))
        except StorageError as error:
            raise RootError(str(error)) from error

    @cached_property
    def _archives(self) -> list[tuple[str, str]]:
        """(folder relative to the root, location) of every archive below the root, in order of name."""
        if is_archive(self.root):
            return [("", self.root)]
        if is_s3(self.root):
            names = [name for name in self._objects if is_archive(name)]
        else:
            base = Path(self.root)
            names = [
                p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file() and is_archive(p.name)
            ]
        return [(os.path.dirname(name), f"{self.root}/{name}") for name in sorted(names)]

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """Path as records give it -> entry; for archives in a folder, with and without that folder."""
        found: dict[str, Entry] = {}
        for folder, archive in self._archives:
            try:
                entries = list(list_entries(archive))
            except (StorageError, UnsafePath) as error:
                raise RootError(str(error)) from error
            for entry in entries:
                for name in {entry.name, f"{folder}/{entry.name}" if folder else entry.name}:
                    found.setdefault(name, entry)
        return found

    def _find_entry(self, relative: str) -> Entry | None:
        if not self._archives:
            return None
        if entry := self._entries.get(relative):
            return entry
        # Some archives put a folder of their own in front; only an unambiguous end counts.
        alike = self._by_last_part.get(relative.rpartition("/")[2], ())
        ends = {e.uri: e for name, e in alike if name.endswith("/" + relative)}
        return next(iter(ends.values())) if len(ends) == 1 else None

    @cached_property
    def _by_last_part(self) -> dict[str, list[tuple[str, Entry]]]:
        found: dict[str, list[tuple[str, Entry]]] = {}
        for name, entry in self._entries.items():
            found.setdefault(name.rpartition("/")[2], []).append((name, entry))
        return found


def _whatever_case(path: Path) -> Path:
    """Perception Test ships some files as `.MP4` whose records may say `.mp4`."""
    if not path.exists() and path.suffix.lower() == ".mp4":
        for suffix in (".mp4", ".MP4"):
            if path.with_suffix(suffix).is_file():
                return path.with_suffix(suffix)
    return path
