"""Work done -> a bar on the screen: rate, time left, rejects. Silent where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class ProgressLine(Protocol):
    def start(self, what: str, total: int) -> None: ...

    def step(self, *, rejected: bool = False) -> None: ...

    def over(self, rows: Iterable[T], what: str) -> Iterator[T]: ...


class Silent:
    """No bar."""

    def start(self, what: str, total: int) -> None:
        return None

    def step(self, *, rejected: bool = False) -> None:
        return None

    def over(self, rows: Iterable[T], what: str) -> Iterator[T]:
        return iter(rows)


class Bar:
    """A rich progress bar; one line at a time, finished lines stay."""

    def __init__(self, bars: object):
        from rich.progress import Progress

        assert isinstance(bars, Progress)
        self._bars, self._rejected = bars, 0

    def start(self, what: str, total: int) -> None:
        self._rejected = 0
        self._task = self._bars.add_task(what, total=total, rejected=0)

    def step(self, *, rejected: bool = False) -> None:
        self._rejected += rejected
        self._bars.update(self._task, advance=1, rejected=self._rejected)

    def over(self, rows: Iterable[T], what: str) -> Iterator[T]:
        task = self._bars.add_task(what, total=None, rejected=0)
        count = 0
        for count, row in enumerate(rows, start=1):
            if count % 256 == 0:
                self._bars.update(task, completed=count)
            yield row
        self._bars.update(task, completed=count, total=count)


@contextmanager
def progress_line(wanted: bool) -> Iterator[ProgressLine]:
    """A bar on a terminal; where output goes to a file or a pod's log, a bar that is written once a line
    ends.
    """
    if not wanted:
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            seconds = task.finished_time if task.finished else task.elapsed
            return f"{task.completed / seconds:,.0f}/s" if seconds else "-/s"

    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rejected]} rejected"),
    )
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield Bar(bars)
