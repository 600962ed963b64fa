"""What is measured and how it ended: measures, rows, the table, the JSON file. Standard library only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LONGEST_REASON = 240


@dataclass(frozen=True, slots=True)
class Measure:
    """One number and the bound that it must keep; bound None: a number that is only told. unit: shown behind it."""

    name: str
    value: float
    bound: float | None = None
    at_most: bool = True
    unit: str = ""

    @property
    def passed(self) -> bool:
        if self.bound is None:
            return math.isfinite(self.value)
        # What is not a number keeps no bound.
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def __str__(self) -> str:
        relation = "" if self.bound is None else f" ({'<=' if self.at_most else '>='} {_short(self.bound)})"
        return f"{self.name} {_short(self.value)}{self.unit}{relation}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. measures: empty where the row did not come to a number, and `reason` says why."""

    name: str
    measures: tuple[Measure, ...] = ()
    seconds: float = 0.0
    reason: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.measures) and not self.reason and all(m.passed for m in self.measures)

    @property
    def shown(self) -> Measure | None:
        """The measure that the row is told by: the first that fails, else the first."""
        return next((m for m in self.measures if not m.passed), next(iter(self.measures), None))

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        return "; ".join(map(str, self.measures)) or "no number"

    def to_json(self) -> dict[str, Any]:
        shown = self.shown
        return {
            "name": self.name,
            "passed": self.passed,
            "value": None if shown is None else _number(shown.value),
            "bound": None if shown is None else shown.bound,
            "measures": [{**asdict(m), "value": _number(m.value), "passed": m.passed} for m in self.measures],
            "seconds": round(self.seconds, 2),
            "reason": self.reason or None,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Row:
        measures = tuple(
            Measure(m["name"], _back(m["value"]), m["bound"], m["at_most"], m["unit"])
            for m in values["measures"]
        )
        return cls(values["name"], measures, values["seconds"], values["reason"] or "")


def failed(name: str, error: BaseException | str, seconds: float = 0.0) -> Row:
    """A row that came to no number: the error's kind and its text, on one line."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    line = " ".join(text.split())
    if len(line) > LONGEST_REASON:
        line = f"{line[: LONGEST_REASON * 2 // 3]} ... {line[-LONGEST_REASON // 4 :]}"
    return Row(name, seconds=seconds, reason=line or type(error).__name__)


@dataclass(slots=True)
class Report:
    """Everything that one run of the command found."""

    device: str
    machine: dict[str, Any]
    replaced: list[str]
    notes: list[str]
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.rows) and all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "machine": self.machine,
            "replaced": self.replaced,
            "notes": self.notes,
            "rows": [row.to_json() for row in self.rows],
        }

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    def table(self) -> str:
        """Markdown, one line a row, columns aligned."""
        return table(
            [(r.name, str(r), "ok" if r.passed else "FAILED", f"{r.seconds:.1f}") for r in self.rows]
        )


def table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    head = ("row", "found", "result", "s")
    widths = [max(len(line[i].replace("|", "/")) for line in (head, *rows)) for i in range(4)]
    lines = [head, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.replace("|", "/").ljust(w) for cell, w in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _short(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}"
    return f"{value:.4g}"


def _number(value: float) -> float | str:
    """JSON has no infinity and no not-a-number."""
    return value if math.isfinite(value) else str(value)


def _back(value: float | str) -> float:
    return float(value)
