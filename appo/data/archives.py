"""Zip and tar archives, local or in S3 -> single entries, read in place.

Only the directory of an archive and the bytes of the entries asked for are read, by seek or ranged request:
an archive of hundreds of GB is never unpacked or downloaded. Publishers' videos are stored in zips (plain or
deflated) and uncompressed tars; a compressed tar has no directory and cannot be read so.
"""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from appo.storage import StorageError, UnsafePath, open_binary, safe_relative

ARCHIVE_SUFFIXES = (".zip", ".tar")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of an archive. offset: of its local header (zip) or its data (tar); size: bytes unpacked."""

    archive: str
    name: str
    offset: int
    size: int
    packed_size: int
    method: int | None  # zip's number; None: tar
    crc32: int | None

    @property
    def uri(self) -> str:
        return f"{self.archive}!/{self.name}"


def is_archive(uri: str) -> bool:
    return uri.lower().endswith(ARCHIVE_SUFFIXES + COMPRESSED_TARS)


def list_entries(archive: str) -> Iterator[Entry]:
    """The regular files of an archive.

    Raises StorageError for a broken or compressed archive, UnsafePath for an entry that would leave it
    (absolute, `..`) or that is a link: such an archive was not made by the publisher.
    """
    if archive.lower().endswith(COMPRESSED_TARS):
        raise StorageError(
            f"{archive}: a compressed tar cannot be read in place; unpack it, or pack it again as .tar"
        )
    try:
        with open_binary(archive) as stream:
            if archive.lower().endswith(".zip"):
                yield from _zip_entries(archive, stream)
            else:
                yield from _tar_entries(archive, stream)
    except (zipfile.BadZipFile, tarfile.TarError, struct.error) as error:
        raise StorageError(f"{archive}: is not a readable archive: {error}; download it again") from error


def _zip_entries(archive: str, stream: object) -> Iterator[Entry]:
    with zipfile.ZipFile(stream) as directory:  # type: ignore[call-overload]
        for info in directory.infolist():
            if info.is_dir():
                continue
            unix_mode = info.external_attr >> 16
            if unix_mode & 0o170000 == 0o120000:
                raise UnsafePath(
                    f"{archive}!/{info.filename}: is a symbolic link; links in archives are refused"
                )
            name = _checked(archive, info.orig_filename)
            yield Entry(
                archive,
                name,
                info.header_offset,
                info.file_size,
                info.compress_size,
                info.compress_type,
                info.CRC,
            )


def _tar_entries(archive: str, stream: object) -> Iterator[Entry]:
    with tarfile.open(fileobj=stream, mode="r:") as directory:  # type: ignore[call-overload]
        for info in directory:
            if info.issym() or info.islnk():
                raise UnsafePath(f"{archive}!/{info.name}: is a link; links in archives are refused")
            if info.isfile():
                name = _checked(archive, info.name)
                yield Entry(archive, name, info.offset_data, info.size, info.size, None, None)


def _checked(archive: str, name: str) -> str:
    try:
        return safe_relative(name)
    except UnsafePath as error:
        raise UnsafePath(f"{archive}: entry {error}") from error


def read_entry(entry: Entry) -> bytes:
    """The entry's bytes, unpacked, its CRC-32 checked (zip). Raises StorageError naming archive and entry."""
    with open_binary(entry.archive) as stream:
        offset = entry.offset
        if entry.method is not None:
            stream.seek(offset)
            header = stream.read(_LOCAL_HEADER.size)
            if len(header) != _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
                raise StorageError(f"{entry.uri}: has no local header; the archive is truncated or damaged")
            *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
            offset += _LOCAL_HEADER.size + name_length + extra_length
        stream.seek(offset)
        packed = stream.read(entry.packed_size)
    if len(packed) != entry.packed_size:
        raise StorageError(
            f"{entry.uri}: ends after {len(packed)} of {entry.packed_size} bytes; download it again"
        )
    data = _unpack(entry, packed)
    if len(data) != entry.size or (entry.crc32 is not None and zlib.crc32(data) != entry.crc32):
        raise StorageError(f"{entry.uri}: does not match its checksum; download the archive again")
    return data


def _unpack(entry: Entry, packed: bytes) -> bytes:
    if entry.method in (None, 0):
        return packed
    if entry.method != 8:
        raise StorageError(f"{entry.uri}: zip method {entry.method} is not read here; store or deflate it")
    try:
        # max_length: an entry that unpacks to more than its directory says is damaged, or a zip bomb
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.size + 1)
    except zlib.error as error:
        raise StorageError(f"{entry.uri}: cannot be inflated: {error}; download the archive again") from error
