"""A row of the check: named figures, each with its bound, and whether all of them held."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """figures: name -> number. problems: what is out of bounds, or the error that ended it, in words."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.problems

    def bounded(
        self, name: str, value: float, *, most: float | None = None, least: float | None = None
    ) -> None:
        """Keep a figure; a problem where it lies outside its bounds (NaN does)."""
        self.figures[name] = value
        if most is not None and not value <= most:
            self.problems.append(f"{name} {value:.3g}, at most {most:g} is allowed")
        if least is not None and not value >= least:
            self.problems.append(f"{name} {value:.3g}, at least {least:g} is asked for")

    def as_json(self) -> dict[str, Any]:
        return {
            "row": self.name,
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "figures": self.figures,
            "problems": self.problems,
        }


Check = Callable[[], Iterator[Row]]


def run(name: str, check: Check, said: Callable[[str], None]) -> Iterator[Row]:
    """The rows of one check as they come; an error becomes a failed row, and the checks after it still run."""
    began = time.perf_counter()
    said(f"{name} ...")
    try:
        for row in check():
            row.seconds = time.perf_counter() - began
            said(line(row))
            yield row
            began = time.perf_counter()
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        row = Row(name, problems=[f"{text} ({last.filename.rpartition('/')[2]}:{last.lineno})"])
        row.seconds = time.perf_counter() - began
        said(line(row))
        yield row


def line(row: Row) -> str:
    return f"  {'ok    ' if row.passed else 'FAILED'} {row.name}: {_figures(row)}"


def table(rows: list[Row]) -> str:
    """Markdown, one line a row."""
    lines = ["| check | verdict | figures | s |", "|---|---|---|---|"]
    for row in rows:
        verdict = "ok" if row.passed else f"FAILED: {'; '.join(row.problems)}"
        lines.append(f"| {row.name} | {verdict} | {_figures(row)} | {row.seconds:.1f} |")
    return "\n".join(lines)


def _figures(row: Row) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in row.figures.items()) or "; ".join(row.problems)
