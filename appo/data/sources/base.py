"""What every source gives: an iterator over a publisher's records, each a `VideoSample` or a `Reject`.

A source is one file in this folder with a `read` function (see `appo.data.sources`). It knows the names of
its publisher's fields and nothing of subsets, splits or decoding.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.storage import open_binary

STAGES = ("record", "path", "decode")
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")
_READ_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Reject:
    """A sample that is left out. stage: one of STAGES; video: the path as the record gives it, or what it
    became.
    """

    id: str
    stage: str
    reason: str
    video: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "stage": self.stage, "video": self.video, "reason": self.reason}


Row = VideoSample | Reject


@dataclass(frozen=True)
class SourceData:
    """rows: read once, lazily. root: where the samples' paths start. files: name -> SHA-256 of what was read;
    it is complete when `rows` is exhausted."""

    rows: Iterable[Row]
    root: str
    files: Mapping[str, str]


def annotations_of(recipe: Recipe) -> str:
    """The annotations that the recipe names. Raises SampleError with the remedy when it names none."""
    if recipe.data.annotations is None:
        raise SampleError(
            f"data.annotations=null: source {recipe.data.source} reads the publisher's records; "
            "name the file with --data or data.annotations"
        )
    return recipe.data.annotations


def root_of(recipe: Recipe, first_folder: str | None = None) -> str:
    """`data.root`; without it the annotations' folder, or its parent when records' paths start with that
    folder.
    """
    if recipe.data.root is not None:
        return recipe.data.root
    folder, _, _ = annotations_of(recipe).rpartition("/")
    parent, _, name = (folder or str(Path.cwd())).rpartition("/")
    return parent if first_folder and name == first_folder else folder or "."


def read_records(
    uri: str,
    to_sample: Callable[[Mapping[str, Any]], VideoSample | None],
    *,
    id_field: str,
    files: dict[str, str],
) -> Iterator[Row]:
    """Each record of a JSON list or JSONL file through `to_sample`; None leaves a record out, as not of this
    set.

    A record that `to_sample` refuses (SampleError, KeyError, TypeError, ValueError) becomes a Reject with its
    reason. The file is streamed and hashed as it is read: hundreds of MB never stand in memory.
    """
    for number, record in enumerate(iter_json(uri, files), start=1):
        name = (
            str(record.get(id_field, f"record {number}"))
            if isinstance(record, Mapping)
            else f"record {number}"
        )
        try:
            if isinstance(record, Broken):
                raise SampleError(record.reason)
            if not isinstance(record, Mapping):
                raise SampleError(f"is {type(record).__name__}, not an object with fields")
            sample = to_sample(record)
        except KeyError as error:
            yield Reject(name, "record", f"{error.args[0]}: is missing; every record of this source needs it")
        except (SampleError, TypeError, ValueError) as error:
            yield Reject(name, "record", str(error))
        else:
            if sample is not None:
                yield sample


@dataclass(frozen=True, slots=True)
class Broken:
    """A line that is not JSON."""

    reason: str


def json_object(uri: str, data: bytes) -> dict[str, Any]:
    """A file that is one JSON object. Raises SampleError naming it."""
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise SampleError(f"{uri}: is not JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise SampleError(f"{uri}: must hold an object, found {type(found).__name__}")
    return found


class _HashingText:
    """Text of a binary stream, decoded piece by piece, while its SHA-256 is taken."""

    def __init__(self, stream: IO[bytes]):
        import codecs

        self._stream, self._decode = stream, codecs.getincrementaldecoder("utf-8-sig")().decode
        self.digest = hashlib.sha256()

    def read(self) -> str:
        """The next piece; empty at the end."""
        while piece := self._stream.read(_READ_CHARS):
            self.digest.update(piece)
            if text := self._decode(piece):
                return text
        return self._decode(b"", True)


def iter_json(uri: str, files: dict[str, str]) -> Iterator[Any]:
    """The items of a JSON list, or of JSONL, one at a time; `files[name]` gets the file's SHA-256 at the end.

    A line of JSONL that is not JSON comes as `Broken`; a list that is not JSON raises SampleError, since
    nothing behind the error can be read.
    """
    with open_binary(uri) as stream:
        text = _HashingText(stream)
        try:
            head = text.read()
            yield from (_items if head.lstrip().startswith("[") else _lines)(uri, head, text)
        except UnicodeDecodeError as error:
            raise SampleError(f"{uri}: is not UTF-8 text: {error}") from error
        files[uri.rpartition("/")[2]] = text.digest.hexdigest()


def _lines(uri: str, buffer: str, text: _HashingText) -> Iterator[Any]:
    number = 0
    while buffer:
        *lines, buffer = buffer.split("\n")
        more = text.read()
        if not more:
            lines, buffer = [*lines, buffer], ""
        for line in lines:
            number += 1
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                yield Broken(f"{uri}, line {number}: is not JSON: {error}")
        buffer += more


def _items(uri: str, buffer: str, text: _HashingText) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), buffer.index("[") + 1
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            while text.read():  # to the end, for the digest
                pass
            return
        try:
            item, end = decoder.raw_decode(buffer, at)
            if end == len(buffer) and not isinstance(item, (dict, list)):
                raise json.JSONDecodeError("a number may go on in the next piece", buffer, end)
        except json.JSONDecodeError as error:
            more = text.read()
            if not more:
                raise SampleError(
                    f"{uri}: is not a complete JSON list: {error}; download it again"
                ) from error
            buffer, at = buffer[at:] + more, 0
            continue
        yield item
        at = end


def without_letter(option: str, index: int) -> str:
    """`"B. red"` -> `"red"` when the letter is the option's own; other text stays."""
    match = _LETTERED.match(option)
    if match and match.group(1) == chr(ord("A") + index):
        return option[match.end() :].strip()
    return option.strip()


def between_tags(text: str, tag: str = "answer") -> str:
    """`"<answer>A</answer>"` -> `"A"`; text without the tags as it is."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, flags=re.DOTALL)
    return (match.group(1) if match else text).strip()


def times(value: Any) -> tuple[tuple[float, float], ...]:
    """Records' `[[start, end], ...]` in seconds; spans of no length are left out."""
    return tuple((float(start), float(end)) for start, end in value or () if float(end) > float(start))


def number_or_none(value: Any) -> float | None:
    """Raises SampleError for what JSON calls NaN or Infinity."""
    number = None if value in (None, "") else float(value)
    if number is not None and not math.isfinite(number):
        raise SampleError(f"{value!r}: must be a finite number")
    return number
