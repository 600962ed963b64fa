"""A table once -> HTML, Markdown and terminal text.

Cells are text; numbers are formatted where the table is built, so that the three never disagree.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from appo.reports.statistics import SeedSummary

UNKNOWN = "–"


@dataclass(frozen=True, slots=True)
class Table:
    """columns: the first names the rows. notes: lines under the table. paper_rows: indices of the paper's
    rows.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    paper_rows: frozenset[int] = field(default=frozenset())

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.key}: a row has {len(row)} cells for {len(self.columns)} columns"
                )


def percent(value: float | None, digits: int = 1) -> str:
    return UNKNOWN if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign."""
    return UNKNOWN if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def with_spread(summary: SeedSummary | None, *, scale: float = 1.0, digits: int = 1) -> str:
    """ "61.2 ± 1.4 (n=3)"; the deviation of one seed is not known, and not shown as 0."""
    if summary is None:
        return UNKNOWN
    mean = f"{scale * summary.mean:.{digits}f}"
    spread = "" if summary.std is None else f" ± {scale * summary.std:.{digits}f}"
    return f"{mean}{spread} (n={summary.n})"


def p_value(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0") if p < 1 else "1"


def to_html(table: Table) -> str:
    """A table that scrolls on its own where the screen is narrow, and can be reached by keyboard."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = []
    for index, row in enumerate(table.rows):
        mark = ' class="paper"' if index in table.paper_rows else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr{mark}><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title, quote=True)}">'
        f"<table><caption>{escape(table.title)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>{notes}"
    )


def to_markdown(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "| --- |" + " ---: |" * (len(table.columns) - 1)
    lines = [f"### {table.title}", "", line(table.columns), rule, *(line(row) for row in table.rows)]
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)]) + "\n"


def to_terminal(table: Table, *, width: int = 118) -> str:
    """Plain text with box lines, for the last lines of a run."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.columns):
        drawn.add_column(Text(name), justify="left" if index == 0 else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note))
    return console.file.getvalue().rstrip() + "\n"  # type: ignore[attr-defined]
