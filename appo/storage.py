"""Paths and `s3://` URIs -> bytes, whole and verified.

The one door to files that other steps, pods or runs read. What is written appears under its final name only
when it is complete: temporary name, fsync, rename (local) or one multipart upload with checksums (S3, see
`appo.objectstore`). Names that come out of records or archives are checked here before they touch a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from appo.errors import UserError

READ_CHUNK = 1 << 20


class StorageError(UserError, OSError):
    """A file or object that cannot be read or written; the message names it, the reason and the remedy."""


class StoreError(StorageError):
    """The store itself fails or refuses: it is down, or lacks credentials or a permission. No file is to blame."""


class UnsafePath(UserError, ValueError):
    """A name that leaves, or tries to leave, the folder it is relative to."""


def is_s3(uri: str | Path) -> bool:
    return str(uri).startswith("s3://")


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds either what it held before or all of it.

    Creates the parent folders. Survives a crash at any point: temporary name beside it, fsync, rename, fsync
    of the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:80]}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; other pods and users read it
        move_into_place(Path(temporary), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def move_into_place(temporary: Path, path: Path) -> None:
    """Give a finished file its final name; both must be in the same folder. Durable after return."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sha256_of(stream: BinaryIO) -> str:
    """Hex SHA-256 of the rest of a binary stream, read in pieces."""
    digest = hashlib.sha256()
    while piece := stream.read(READ_CHUNK):
        digest.update(piece)
    return digest.hexdigest()


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return sha256_of(file)


def safe_relative(name: str) -> str:
    """A record's or archive entry's name, normalised: `./a//b.mp4` -> `a/b.mp4`.

    Raises UnsafePath for absolute names, drive letters, back-slashes, NUL and any `..`.
    """
    if not name or "\x00" in name:
        raise UnsafePath(f"path {name!r}: is empty or holds a NUL character")
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
        raise UnsafePath(f"path {name!r}: must be relative to the data root, written with forward slashes")
    if "://" in name:
        raise UnsafePath(f"path {name!r}: must be a path below the data root, not a URI")
    parts = [part for part in PurePosixPath(name).parts if part != "."]
    if ".." in parts:
        raise UnsafePath(f"path {name!r}: must not climb out of the data root with '..'")
    if not parts:
        raise UnsafePath(f"path {name!r}: names no file")
    return "/".join(parts)


def inside(root: Path, name: str) -> Path:
    """`root/name` when that lies inside `root` even after symbolic links are followed; the file need not
    exist.

    Raises UnsafePath otherwise.
    """
    relative = safe_relative(name)
    base = Path(os.path.realpath(root))
    target = Path(os.path.realpath(base / relative))
    if target != base and base not in target.parents:
        raise UnsafePath(
            f"path {name!r}: a symbolic link leads out of {root}; copy the file below it instead"
        )
    return base / relative


def open_binary(uri: str | Path) -> BinaryIO:
    """A seekable binary stream of a local file, or of an object (`s3://bucket/key`) through ranged reads.

    Raises StorageError naming the URI and the reason.
    """
    if is_s3(uri):
        from appo.objectstore import open_object

        return open_object(str(uri))
    try:
        return open(uri, "rb")
    except OSError as error:
        raise StorageError(
            f"{uri}: cannot be opened: {error.strerror or error}; see that the path is right and may be read"
        ) from error


def read_bytes(uri: str | Path) -> bytes:
    """The whole of a local file or object; an object's checksum is verified."""
    with open_binary(uri) as stream:
        return stream.read()


def write(uri: str | Path, data: bytes | str) -> None:
    """`write_atomic` for local paths, a checksummed put for `s3://`."""
    if is_s3(uri):
        from appo.objectstore import put_bytes

        put_bytes(str(uri), data.encode("utf-8") if isinstance(data, str) else data)
    else:
        write_atomic(Path(uri), data)


def fetch(uri: str | Path, target: Path) -> Path:
    """A verified local copy of `uri` at `target`, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:80]}.", suffix=".tmp", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if is_s3(uri):
                from appo.objectstore import download

                download(str(uri), file)
            else:
                with open_binary(uri) as stream:
                    shutil.copyfileobj(stream, file, READ_CHUNK)
        os.chmod(temporary, 0o644)
        move_into_place(Path(temporary), target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return target
