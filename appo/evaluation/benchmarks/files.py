"""Publishers' annotation files -> records with the place they stand at, so that every complaint can name it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from appo.data.schema import SampleError, VideoSample
from appo.evaluation.benchmarks.base import AnnotationError

Record = Mapping[str, Any]


def find_file(folder: Path, names: Sequence[str], *, benchmark: str) -> Path:
    """The first of `names` in the folder or its `annotations` sub-folder; a file given outright is taken."""
    if folder.is_file():
        return folder
    for place in (folder, folder / "annotations", folder / "json"):
        for name in names:
            if (place / name).is_file():
                return place / name
    raise AnnotationError(f"{folder}: holds none of {', '.join(names)}, the annotations of {benchmark}")


def read_lines(path: Path) -> Iterator[tuple[str, Record]]:
    """(place, record) of every line of a JSONL file, or of every element of a JSON list."""
    text = _text(path)
    if path.suffix == ".json":
        found = parse_json(path, text)
        if not isinstance(found, list):
            raise AnnotationError(f"{path}: is a JSON {type(found).__name__}, not a list of records")
        numbered: Iterator[tuple[str, Any]] = ((f"{path}, record {i}", one) for i, one in enumerate(found, 1))
    else:
        numbered = (
            (f"{path}, line {i}", parse_json(path, line, i))
            for i, line in enumerate(text.split("\n"), 1)
            if line.strip()
        )
    for place, record in numbered:
        if not isinstance(record, Mapping):
            raise AnnotationError(f"{place}: is {type(record).__name__}, not an object with fields")
        yield place, record


def read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, row) of a CSV file with a header line."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num}: is not CSV: {error}") from error


def parse_json(path: Path, text: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # no JSON; a number of thousands of digits; endless brackets
        where = path if line is None else f"{path}, line {line}"
        raise AnnotationError(f"{where}: is not JSON: {error}") from error


def read_json(path: Path) -> Any:
    return parse_json(path, _text(path))


def samples_from(
    rows: Iterator[tuple[str, Any]], to_sample: Callable[[Any], VideoSample | None], *, benchmark: str
) -> list[VideoSample]:
    """A sample of every record (None: not part of the set). Any record that cannot be one is an error: scores over
    part of a benchmark are not comparable.
    """
    found: dict[str, VideoSample] = {}
    for place, record in rows:
        try:
            sample = to_sample(record)
        except KeyError as error:
            raise AnnotationError(
                f"{place}: {error.args[0]}: is missing; is this an annotation file of {benchmark}?"
            ) from error
        except (SampleError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise AnnotationError(f"{place}: {error}; is this an annotation file of {benchmark}?") from error
        if sample is None:
            continue
        if sample.id in found:
            raise AnnotationError(f"{place}: id {sample.id!r} appears twice")
        found[sample.id] = sample
    return list(found.values())


def require_items(items: list[VideoSample], place: Path, benchmark: str) -> list[VideoSample]:
    if not items:
        raise AnnotationError(f"{place}: holds no item of {benchmark}")
    return items


def letter_of(index: int, options: Sequence[str]) -> str:
    """The letter of an option by its index. Raises SampleError past the last one."""
    if not 0 <= index < len(options):
        raise SampleError(f"answer={index}: must be an index from 0 to {len(options) - 1}")
    return chr(ord("A") + index)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: is not UTF-8 text: {error}") from error
