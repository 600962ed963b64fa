"""Output of running steps -> a story on the screen, and everything else in log files.

What a step prints to stdout is meant for the person watching; stderr (libraries, warnings) goes to the
step's log. Progress bars are recognised by the way they overwrite their line: on a terminal each running
step keeps one live line, elsewhere (a CI log) its state is printed now and then.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from appo.errors import said_in

QUIET_INTERVAL_S = 20.0
TAIL_LINES = 25
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*\x07")
_BAR = re.compile(r"\|?[━╸╺─█▉▊▋▌▍▎▏#\s]{3,}\|?|\|\s+\|")
_ERASES = re.compile(rb"\x1b\[[0-9;?]*[KJAFGH]")


class Story:
    """Lines and live progress of all running steps; safe to use from the threads that run them."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[label]:<22}"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self._live = self.console.is_terminal

    def __enter__(self) -> Story:
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._progress.stop()

    def say(self, text: str) -> None:
        """One line of markup."""
        self.console.print(text, highlight=False)

    def step(self, label: str, doing: str, log: Path) -> Step:
        """Announce a step that starts now."""
        self.say(f"[bold cyan]>[/] [bold]{escape(label):<20}[/] {escape(doing)}")
        task = self._progress.add_task("", label=label, total=None) if self._live else None
        return Step(self, label, log, task)

    def update(self, task: TaskID | None, text: str) -> None:
        if task is not None:
            self._progress.update(task, description=escape(text[: max(20, self.console.width - 40)]))

    def remove(self, task: TaskID | None) -> None:
        if task is not None:
            self._progress.remove_task(task)


class Step:
    """One running step: its lines, its progress, its log file."""

    def __init__(self, story: Story, label: str, log: Path, task: TaskID | None) -> None:
        self.label, self.log_path = label, log
        self._story, self._task = story, task
        self._started_s = time.monotonic()
        self._said_s = time.monotonic()
        self._state = ""
        self._lock = threading.Lock()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("ab")

    def read_stdout(self, stream: BinaryIO) -> None:
        """Show lines; turn overwritten ones into progress."""
        dump = False  # KFP's executor prints its whole input
        for text, overwritten in pieces(stream):
            if overwritten:
                self._progress(text)
                continue
            self._write(text)
            if "[KFP Executor" in text:
                dump = text.rstrip().endswith("Got executor_input:")
            elif dump:
                dump = text != "}"
            elif text.strip():
                self._story.say(f"    [dim]{escape(self.label):<18}[/] {escape(text.rstrip())}")

    def read_stderr(self, stream: BinaryIO) -> None:
        """Keep lines in the log; show progress only."""
        for text, overwritten in pieces(stream):
            if overwritten:
                self._progress(text)
            else:
                self._write(text)

    def _write(self, text: str) -> None:
        with self._lock:
            self._log.write(text.encode() + b"\n")
            self._log.flush()

    def _progress(self, text: str) -> None:
        text = " ".join(_BAR.sub(" ", text).split())
        if not text or text == self._state:
            return
        self._state = text
        self._story.update(self._task, text)
        now = time.monotonic()
        if self._task is None and now - self._said_s > QUIET_INTERVAL_S:
            self._said_s = now
            self._story.say(f"    [dim]{escape(self.label):<18} {escape(text)}[/]")

    def end(self, *, failed: bool) -> list[str]:
        """Say how it ended; after a failure also why, out of its log. Returns the lines of an expected mistake."""
        self._log.close()
        self._story.remove(self._task)
        took = f"{time.monotonic() - self._started_s:.0f} s"
        if not failed:
            self._story.say(f"[bold green]✓[/] [bold]{escape(self.label):<20}[/] {took}")
            return []
        self._story.say(f"[bold red]✗[/] [bold]{escape(self.label):<20}[/] failed after {took}")
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        mistake = said_in(lines)
        for line in mistake or _reason(lines):
            self._story.say(f"    [red]{escape(line)}[/]")
        self._story.say(f"    the whole log: {escape(str(self.log_path))}")
        return mistake


def _reason(lines: list[str]) -> list[str]:
    """The end of a failed step's log: its last lines, without the frames of KFP's executor."""
    start = max(0, len(lines) - TAIL_LINES)
    for number in range(len(lines) - 1, start, -1):
        if "ephemeral_component.py" in lines[number] or lines[number].startswith("Traceback"):
            return [line for line in lines[number + 1 :] if line.strip(" ^~")]
    return lines[start:]


def pieces(stream: BinaryIO) -> Iterator[tuple[str, bool]]:
    """A byte stream -> (text without control codes, whether it was written to be overwritten).

    tqdm begins each state with a carriage return, rich erases the line first; both end one by writing the
    next.
    """
    buffer = b""
    fresh = False  # the current line began by erasing another one
    while chunk := stream.read1(65536) if hasattr(stream, "read1") else stream.read(65536):
        buffer += chunk
        while match := re.search(rb"\r?\n|\r", buffer):
            line, end = buffer[: match.start()], match.group()
            if end == b"\r" and match.end() == len(buffer):
                break  # the line feed of a \r\n may be in the next chunk
            buffer = buffer[match.end() :]
            overwritten = fresh or end == b"\r" or bool(_ERASES.search(line))
            fresh = end == b"\r"
            yield _ESCAPES.sub(b"", line).decode("utf-8", "replace"), overwritten
        if fresh and buffer:  # a bar's newest state has no end yet
            yield _ESCAPES.sub(b"", buffer).decode("utf-8", "replace"), True
            buffer = b""
    if buffer:
        yield _ESCAPES.sub(b"", buffer).decode("utf-8", "replace"), fresh
