"""Where computed visual features lie between processes and runs: a folder or an `s3://` prefix, bounded in
bytes.

Free of torch. Below `feature_cache`, which knows what a key means and whether what comes back is whole. Any number of
processes may read and write: a name is given to a finished file only, and two writers of one key write the
same bytes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from appo.storage import StorageError, is_s3, read_bytes, write, write_atomic

if TYPE_CHECKING:
    from appo.config import Recipe

SUFFIX = ".safetensors"
# Room made at once when the bound is passed, so that the next write does not have to look again.
_KEPT_SHARE = 0.9
# A writer looks at the whole place again when it has itself filled this part of what was free.
_SLACK_SHARE = 1 / 16
# Files that a killed writer left behind; none takes an hour to write.
_ABANDONED_S = 3600.0


class FeatureFiles(Protocol):
    def get(self, key: str) -> bytes | None:
        """What was stored under `key`, None when nothing was. Raises StorageError when it cannot be read."""
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store whole or not at all, then keep to the bound. Raises StorageError when that fails."""
        ...

    def remove(self, key: str) -> None:
        """Forget a key; nothing happens when it is not there."""
        ...


def why_not(recipe: Recipe) -> str | None:
    """The reason why features are not kept under this recipe; None when they are."""
    if not recipe.model.freeze_vision:
        return "the tower trains"
    return None if recipe.training.feature_cache else "training.feature_cache"


def nothing_to_fill(recipe: Recipe) -> str | None:
    """The reason why there is no place to compute features into beforehand; None when there is one."""
    if reason := why_not(recipe):
        return reason
    return (
        None if recipe.training.feature_cache_dir else "training.feature_cache_dir=null: kept in memory only"
    )


def open_files(place: str, limit_bytes: int) -> FeatureFiles:
    """Raises StorageError when a local folder cannot be made or written."""
    return _Bucket(place, limit_bytes) if is_s3(place) else _Folder(Path(place), limit_bytes)


class _Bounded:
    """Counts what this process adds and looks at the whole place when the bound may have been reached."""

    def __init__(self, limit_bytes: int):
        self._limit, self._added, self._look_after = limit_bytes, 0, 0

    def _count(self, size: int) -> None:
        self._added += size
        if self._added > self._look_after:
            self._look_after = int((self._limit - self._trim()) * _SLACK_SHARE)
            self._added = 0

    def _trim(self) -> int:
        """Remove the least recently used while there is more than the bound; returns the bytes that stay."""
        found = sorted(self._list())
        total = sum(size for _, size, _ in found)
        if total <= self._limit:
            return total
        for _, size, name in found:
            if total <= self._limit * _KEPT_SHARE:
                break
            self._delete(name)
            total -= size
        return total

    def _list(self) -> Iterator[tuple[float, int, str]]:
        """(when used, bytes, name)"""
        raise NotImplementedError

    def _delete(self, name: str) -> None:
        raise NotImplementedError


class _Folder(_Bounded):
    """Files in 256 folders; their modification time is when they were used last."""

    def __init__(self, place: Path, limit_bytes: int):
        super().__init__(limit_bytes)
        self._place = place
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"training.feature_cache_dir={place}: cannot be made: {error.strerror}; name another"
            ) from error
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageError(f"training.feature_cache_dir={place}: is not writable; name a writable folder")

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
        with contextlib.suppress(OSError):  # removed by another process in between, or a read-only volume
            os.utime(path)
        return data

    def put(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            write_atomic(path, data)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
        self._count(len(data))

    def remove(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._place / key[:2] / f"{key}{SUFFIX}"

    def _list(self) -> Iterator[tuple[float, int, str]]:
        for folder in self._place.glob("[0-9a-f][0-9a-f]"):
            for entry in os.scandir(folder):
                try:
                    known = entry.stat()
                except FileNotFoundError:  # another process was faster
                    continue
                if entry.name.endswith(SUFFIX):
                    yield known.st_mtime, known.st_size, entry.path
                elif entry.name.endswith(".tmp") and time.time() - known.st_mtime > _ABANDONED_S:
                    Path(entry.path).unlink(missing_ok=True)

    def _delete(self, name: str) -> None:
        Path(name).unlink(missing_ok=True)


class _Bucket(_Bounded):
    """Objects below a prefix. S3 keeps no time of reading: the oldest written go first."""

    def __init__(self, place: str, limit_bytes: int):
        super().__init__(limit_bytes)
        self._place = place.rstrip("/")

    def get(self, key: str) -> bytes | None:
        try:
            return read_bytes(self._uri(key))
        except StorageError as error:
            if str(error).endswith("no such object"):
                return None
            raise

    def put(self, key: str, data: bytes) -> None:
        write(self._uri(key), data)
        self._count(len(data))

    def remove(self, key: str) -> None:
        self._delete(self._name(key))

    def _uri(self, key: str) -> str:
        return f"{self._place}/{key[:2]}/{key}{SUFFIX}"

    def _name(self, key: str) -> str:
        from appo.objectstore import split_uri

        return split_uri(self._uri(key))[1]

    def _client(self) -> tuple[Any, str, str]:
        from appo.objectstore import client, split_uri

        bucket, prefix = split_uri(self._place)
        return client(), bucket, prefix

    def _list(self) -> Iterator[tuple[float, int, str]]:
        client, bucket, prefix = self._client()
        folder = f"{prefix}/" if prefix else ""
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=folder):
            for item in page.get("Contents", ()):
                if item["Key"].endswith(SUFFIX):
                    yield item["LastModified"].timestamp(), item["Size"], item["Key"]

    def _delete(self, name: str) -> None:
        client, bucket, _ = self._client()
        client.delete_object(Bucket=bucket, Key=name)
