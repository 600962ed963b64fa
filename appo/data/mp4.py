"""The header of an MP4 or MOV file -> the size of its frames as they are shown, without decoding one.

decord can scale while it converts colours, nearly for free, but must be told the size when it opens a file;
opening twice to ask for it costs a twentieth of decoding a short clip. Source: ISO/IEC 14496-12, boxes moov,
tkhd and stsd.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

MOOV_LIMIT = 64 << 20  # of a header that is read; an hour of video needs about 1 MiB
_CONTAINERS = (b"trak", b"mdia", b"minf", b"stbl")


def frame_size(stream: BinaryIO) -> tuple[int, int] | None:
    """(height, width) of the first video track after rotation; None for anything else than a plain MP4."""
    try:
        moov = _find_moov(stream)
        if moov is None:
            return None
        for name, body in _boxes(moov):
            if name == b"trak" and (size := _of_track(body)) is not None:
                return size
    except (struct.error, IndexError):  # not an MP4, or a broken one: the decoder will say so
        return None
    return None


def _find_moov(stream: BinaryIO) -> bytes | None:
    stream.seek(0)
    first = True
    while len(header := stream.read(8)) == 8:
        size, name = struct.unpack(">I4s", header)
        if first and name not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return None
        first, used = False, 8
        if size == 1:
            size, used = struct.unpack(">Q", stream.read(8))[0], 16
        if name == b"moov":
            return stream.read(size - used) if used <= size <= MOOV_LIMIT else None
        if size < used:  # 0: to the end of the file
            return None
        stream.seek(size - used, 1)
    return None


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size < 8:
            return
        yield name, data[at + 8 : at + size]
        at += size


def _of_track(track: bytes) -> tuple[int, int] | None:
    found: dict[bytes, bytes] = {}
    pending = [track]
    while pending:
        for name, body in _boxes(pending.pop()):
            if name in _CONTAINERS:
                pending.append(body)
            else:
                found.setdefault(name, body)
    if found.get(b"hdlr", b"")[8:12] != b"vide" or b"stsd" not in found or b"tkhd" not in found:
        return None
    # stsd: version and count (8 bytes), then the first entry's header (8), reserved (24), width and height.
    width, height = struct.unpack_from(">HH", found[b"stsd"], 8 + 8 + 24)
    if not width or not height:
        return None
    header = found[b"tkhd"]
    a, b, _, c, d = struct.unpack_from(">5i", header, 52 if header[0] == 1 else 40)
    return (width, height) if a == d == 0 and b and c else (height, width)
