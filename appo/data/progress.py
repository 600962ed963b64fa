"""Work done -> a bar on the screen: rate, time left, rejects. Silent where nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TypeVar

T = TypeVar("T")
LINE_EVERY_S = 30.0


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


class Lines:
    """A line every `every_s` seconds and one at the end: for a pod's log, which shows no bar."""

    def __init__(self, write: Callable[[str], object], *, every_s: float = LINE_EVERY_S):
        self._write, self._every_s = write, every_s

    def start(self, what: str, total: int | None) -> None:
        self._what, self._total = what, total
        self._done = self._rejected = 0
        self._began = self._said = time.monotonic()

    def step(self, *, rejected: bool = False) -> None:
        self._done += 1
        self._rejected += rejected
        if self._done == self._total or time.monotonic() - self._said >= self._every_s:
            self._say()

    def over(self, rows: Iterable[T], what: str) -> Iterator[T]:
        self.start(what, None)
        for row in rows:
            self.step()
            yield row
        self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        per_s = self._done / max(self._said - self._began, 1e-9)
        parts = [f"{self._what}: {self._done:,}"]
        if self._total is not None:
            left = timedelta(seconds=round((self._total - self._done) / per_s))
            parts = [f"{parts[0]} of {self._total:,}", f"{left} left", f"{self._rejected:,} rejected"]
        self._write(", ".join([parts[0], _rate(per_s), *parts[1:]]))


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}/s" if per_s >= 10 else f"{per_s:.2g}/s"


@contextmanager
def progress_line(wanted: bool) -> Iterator[ProgressLine]:
    """A bar on a terminal, a line now and then where output goes to a file or a pod's log."""
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
            return _rate(task.completed / seconds) if seconds else "-/s"

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield Lines(lambda line: print(line, file=sys.stderr, flush=True))
        return
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
