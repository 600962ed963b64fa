"""A sample's path and the data root -> the bytes of its video or image, wherever they lie.

The root is a folder, one archive, or an S3 prefix or archive. Publishers ship folders of zips next to one
another (`STAR/STAR_part1.zip` holds what the records call `./STAR/...`): a path that is no file below the
root is looked up in the archives there. Paths out of records are hostile until checked (see
`appo.storage.safe_relative`).
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
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
        if self.local is None:
            return hashlib.sha256(self.read()).hexdigest()
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
        for spelling in _spellings(relative):
            if found := self._find_file(spelling):
                return found
        for spelling in _spellings(relative):
            if entry := self._find_entry(spelling):
                return _of_entry(entry)
        raise MediaMissing(f"{self.root}/{relative}: no such file{self._searched()}")

    def files(self, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Medium]]:
        """(name, medium) of every file below the root whose suffix, in small letters, is one of `suffixes`; those
        in archives too. In order of name. Raises RootError."""
        found: dict[str, Medium] = {}
        for folder, archive in self._archives:
            for entry in self._read_directory(archive):
                found[f"{folder}/{entry.name}" if folder else entry.name] = _of_entry(entry)
        for name in self._names():
            place = f"{self.root}/{name}"
            found[name] = Medium(place, "", local=None if is_s3(place) else Path(place))
        yield from ((name, found[name]) for name in sorted(found) if name.lower().endswith(suffixes))

    def _find_file(self, relative: str) -> Medium | None:
        """A file or an object of exactly this name."""
        if is_archive(self.root):
            return None
        if is_s3(self.root):
            stamp = self._objects.get(relative)
            return None if stamp is None else Medium(f"{self.root}/{relative}", stamp)
        path = inside(Path(self.root), relative)
        try:
            if path.is_file():
                status = path.stat()
                return Medium(str(path), f"{status.st_size}-{status.st_mtime_ns}", local=path)
            if is_frame_folder(path):
                return Medium(str(path), folder_stamp(path), local=path)
            if path.exists():
                raise MediaMissing(f"{path}: is not a regular file")
        except OSError as error:  # a name too long for the file system, a folder that may not be read
            if isinstance(error, StorageError):
                raise
            raise MediaMissing(f"{str(path)[:300]}: {error.strerror}") from error
        return None

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

    def _names(self) -> Iterator[str]:
        """Every file below the root, relative to it; none where the root is an archive."""
        if is_archive(self.root):
            return
        if is_s3(self.root):
            yield from self._objects
        else:
            base = Path(self.root)
            yield from (p.relative_to(base).as_posix() for p in base.rglob("*") if p.is_file())

    @cached_property
    def _archives(self) -> list[tuple[str, str]]:
        """(folder relative to the root, location) of every archive below the root, in order of name."""
        if is_archive(self.root):
            return [("", self.root)]
        names = sorted(name for name in self._names() if is_archive(name))
        return [(os.path.dirname(name), f"{self.root}/{name}") for name in names]

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        """Path as records give it -> entry; for archives in a folder, with and without that folder."""
        found: dict[str, Entry] = {}
        for folder, archive in self._archives:
            for entry in self._read_directory(archive):
                for name in {entry.name, f"{folder}/{entry.name}" if folder else entry.name}:
                    found.setdefault(name, entry)
        return found

    def _read_directory(self, archive: str) -> list[Entry]:
        try:
            return list(list_entries(archive))
        except (StorageError, UnsafePath) as error:
            raise RootError(str(error)) from error

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


def _of_entry(entry: Entry) -> Medium:
    return Medium(entry.uri, f"{entry.size}-{entry.crc32 or 0:08x}", entry=entry)


def _spellings(relative: str) -> list[str]:
    """The name, then with its suffix in small and in capital letters: Perception Test ships some files as `.MP4`
    whose records say `.mp4`."""
    stem, suffix = os.path.splitext(relative)
    return list(dict.fromkeys([relative, stem + suffix.lower(), stem + suffix.upper()]))
