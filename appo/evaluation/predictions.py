"""Generations <-> prediction files: one JSON object a line, appended as items finish, checked when read.

Between the engine and scoring. A file that a run wrote opens with a header line that says what was generated
with, so that a run is only ever continued under the settings it began with. Files of other systems have no
header and need only `id` and `response`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from appo.errors import UserError
from appo.rewards.temporal import Span
from appo.storage import write_atomic

HEADER = "header"
TimeFormat = Literal["tags", "span"]


class PredictionError(UserError, ValueError):
    """A prediction file that cannot be scored or continued: file, line, reason."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a system said to one item.

    response: the whole text; None when nothing was generated (then `error` may say why). finish_reason:
    "stop", "length" (cut off at the token limit) or None when unknown. answer, spans: given outright by
    files in the span format, which have no response; seconds.
    """

    id: str
    response: str | None
    finish_reason: str | None = None
    answer: str | None = None
    spans: tuple[Span, ...] | None = None
    error: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    @property
    def missing(self) -> bool:
        return self.response is None and self.answer is None and self.spans is None


def read_predictions(
    path: Path, ids: Sequence[str], *, time_format: TimeFormat = "tags"
) -> dict[str, Prediction]:
    """Every prediction of a file by id; items without one are simply not in it.

    Raises PredictionError with the line number for a line that is no JSON object, lacks a field or has one
    of the wrong type, names an id that is not among `ids`, or one that came before.
    """
    known, found, first_seen = set(ids), {}, {}  # type: ignore[var-annotated]
    for number, record in _lines(path):
        try:
            prediction = parse_prediction(record, time_format=time_format)
        except PredictionError as error:
            raise PredictionError(f"{path}, line {number}: {error}") from error
        if prediction.id not in known:
            raise PredictionError(
                f"{path}, line {number}: id {prediction.id!r} is not an item of this benchmark and split "
                f"({len(known)} items, such as {next(iter(ids), '')!r})"
            )
        if prediction.id in found:
            raise PredictionError(
                f"{path}, line {number}: id {prediction.id!r} was given in line "
                f"{first_seen[prediction.id]} already"
            )
        found[prediction.id] = prediction
        first_seen[prediction.id] = number
    return found


def parse_prediction(record: Mapping[str, Any], *, time_format: TimeFormat = "tags") -> Prediction:
    """One line's object. tags: `{"id", "response"}`; span: `{"id", "answer", "span": [s, e]}` in seconds.

    In the span format `span` may also be a list of such pairs, and `answer` or `span` null (not given).
    """
    if "id" not in record:
        raise PredictionError("id: is missing")
    name = record["id"]
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise PredictionError(f"id={name!r}: must be a string")
    if time_format == "span":
        missing = [key for key in ("answer", "span") if key not in record]
        if missing:
            raise PredictionError(f"{missing[0]}: is missing; --time-format span wants id, answer, span")
        answer = record["answer"]
        if answer is not None and not isinstance(answer, str | int):
            raise PredictionError(f"answer={answer!r}: must be a string, or null for none")
        spans = None if record["span"] is None else _spans(record["span"])
        return Prediction(str(name), None, answer=None if answer is None else str(answer), spans=spans)
    if "response" not in record:
        raise PredictionError('response: is missing; lines are {"id": ..., "response": ...}')
    response = record["response"]
    if response is not None and not isinstance(response, str):
        raise PredictionError(f"response={response!r}: must be a string, or null where nothing was generated")
    reason = record.get("finish_reason")
    if reason is not None and not isinstance(reason, str):
        raise PredictionError(f"finish_reason={reason!r}: must be a string or null")
    return Prediction(str(name), response, reason, error=record.get("error"), record=record)


def _spans(value: Any) -> tuple[Span, ...]:
    pairs = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
    spans = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_seconds, pair)):
            raise PredictionError(
                f"span={repr(value)[:200]}: must be [start, end] in seconds, or a list of such pairs"
            )
        spans.append((float(pair[0]), float(pair[1])))
    return tuple(spans)


def _is_seconds(value: Any) -> bool:
    # -1e9 < x < 1e9 holds for no NaN and no infinity, and asks nothing of an integer that no float can hold.
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise PredictionError(f"{path}: no such prediction file")
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                record = json.loads(text)
            except UnicodeDecodeError as error:
                raise PredictionError(f"{path}, line {number}: is not UTF-8: {error}") from error
            except (
                ValueError,
                RecursionError,
            ) as error:  # no JSON; a number of thousands of digits; endless brackets
                raise PredictionError(f"{path}, line {number}: is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise PredictionError(f"{path}, line {number}: is {type(record).__name__}, not an object")
            if record.get("kind") != HEADER:
                yield number, record


def _line(record: Mapping[str, Any]) -> str:
    """One line of readable JSON, also for readers that take Unicode's other line ends for one."""
    text = json.dumps(record, ensure_ascii=False)
    for sign in "\x85\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


class PredictionLog:
    """The file of one run over one benchmark: opened to append, continued where it stopped.

    header: everything that decides the responses; an existing file with another one is refused, not mixed
    with.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path = path
        self.header = {"kind": HEADER, **header}
        self.records: dict[str, dict[str, Any]] = {}
        self._file: Any = None
        if path.exists():
            self._read_back()

    def _read_back(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):  # killed in the middle of a line: that item is generated again
            with open(self.path, "r+b") as file:
                file.truncate(whole)
        if whole == 0:
            return
        lines = data[:whole].decode("utf-8").split("\n")
        try:
            found, *records = [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            raise PredictionError(f"{self.path}: cannot be continued, a line is no JSON: {error}") from error
        if found != self.header:
            changed = sorted(key for key in {*found, *self.header} if found.get(key) != self.header.get(key))
            raise PredictionError(
                f"{self.path}: was generated with other settings ({', '.join(changed)}); "
                "use another output folder, or delete the file to generate again"
            )
        # An item whose video failed is tried again.
        self.records = {record["id"]: record for record in records if record.get("error") is None}

    def add(self, record: Mapping[str, Any]) -> None:
        """Append one item; it is on its way to the disk when this returns (a crash of the process loses
        nothing).
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists() or self.path.stat().st_size == 0
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
            if fresh:
                self._write(self.header)
        self.records[str(record["id"])] = dict(record)
        self._write(record)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the file by header and these records, whole: equal runs end in equal bytes, whatever the
        order in which items finished."""
        self.close()
        lines = [_line(record) for record in [self.header, *records]]
        write_atomic(self.path, "\n".join(lines) + "\n")
