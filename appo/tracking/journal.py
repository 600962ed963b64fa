"""Events of one run -> an append-only JSONL file with a cursor that says how far it has been sent.

`Tracker` appends, `Sender` reads. The file is the truth; MLflow holds a copy of it. A journal is locked by
the process that writes it, so that a later one can tell a live run from one that was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any

from appo.errors import UserError

Event = dict[str, Any]


class JournalBusy(UserError, RuntimeError):
    """Another living process writes this journal."""


class Journal:
    """One file of events and its cursor. Thread-safe; one writing process at a time.

    path: the JSONL file, made with its folder. When the disk refuses a line (full, read-only), events wait in
    memory instead, in order, and `spilled` counts them; they are sent like the others but would not outlive
    the process. Raises JournalBusy when another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cursor_path = path.with_suffix(".cursor")
        self.spilled = 0
        self._lock = threading.Lock()
        self._memory: deque[Event] = deque()
        self._file: Any = None
        self._lock_file: Any = None
        self._open()
        self.sent_bytes, self.ids = self._read_cursor()

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = self.path.with_suffix(".lock").open("a")
        except OSError:  # no disk to write on: events stay in memory, `append` counts them
            return
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise JournalBusy(f"{self.path}: another process is writing this run") from error
        with contextlib.suppress(OSError):
            self._drop_torn_line()
            self._file = self.path.open("ab", buffering=0)

    def _drop_torn_line(self) -> None:
        """A process that was killed while writing leaves half a line; the whole ones before it are good."""
        if not self.path.is_file():
            return
        with open(self.path, "rb+") as file:
            size = file.seek(0, os.SEEK_END)
            tail = min(size, 1 << 20)
            file.seek(size - tail)
            end = file.read(tail).rfind(b"\n")
            if tail and end + 1 != tail:
                file.truncate(size - tail + end + 1)

    def append(self, event: Event) -> None:
        """Write one event at the end; to memory where the disk refuses."""
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            # Once something waits in memory, later events must wait behind it, or the order is lost.
            if self._file is not None and not self._memory:
                start = self._end()
                try:
                    written = self._file.write(line)
                    if written == len(line):
                        return
                except OSError:  # disk full: below
                    pass
                with contextlib.suppress(OSError):  # half a line must not stay before the next whole one
                    self._file.truncate(start)
            self._memory.append(event)
            self.spilled += 1

    def _end(self) -> int:
        try:
            return os.fstat(self._file.fileno()).st_size
        except OSError:
            return 0

    def pending(self, limit: int) -> tuple[list[Event], int]:
        """Up to `limit` events not yet sent, and the cursor to `commit` once they are.

        The cursor counts bytes of the file; -n stands for n events of the memory queue.
        """
        with self._lock:
            events: list[Event] = []
            position = self.sent_bytes
            try:
                with open(self.path, "rb") as file:
                    file.seek(position)
                    for line in file:
                        if not line.endswith(b"\n") or len(events) == limit:
                            break
                        events.append(json.loads(line))
                        position += len(line)
            except OSError:  # never written: everything is in memory
                pass
            if events or not self._memory:
                return events, position
            held = list(self._memory)[:limit]
            return held, -len(held)

    def commit(self, cursor: int, ids: dict[str, str]) -> None:
        """Remember that everything up to `cursor` has been sent, and which run each name is in MLflow."""
        with self._lock:
            self.ids = dict(ids)
            if cursor < 0:
                for _ in range(-cursor):
                    self._memory.popleft()
            else:
                self.sent_bytes = cursor
            state = json.dumps({"sent_bytes": self.sent_bytes, "ids": self.ids})
            temporary = self.cursor_path.with_suffix(f".cursor.{os.getpid()}")
            # Losing the cursor costs a second sending, which MLflow recognises by time stamps and run keys.
            with contextlib.suppress(OSError):
                temporary.write_text(state, encoding="utf-8")
                os.replace(temporary, self.cursor_path)

    def _read_cursor(self) -> tuple[int, dict[str, str]]:
        try:
            state = json.loads(self.cursor_path.read_text(encoding="utf-8"))
            sent, ids = int(state["sent_bytes"]), dict(state["ids"])
        except (OSError, ValueError, KeyError):  # none yet, or torn: start from the first event
            return 0, {}
        return (sent, ids) if self.path.is_file() and sent <= self.path.stat().st_size else (0, ids)

    def events(self) -> list[Event]:
        """All events on disk, sent or not."""
        try:
            with open(self.path, "rb") as file:
                return [json.loads(line) for line in file if line.endswith(b"\n")]
        except OSError:
            return []

    @property
    def unsent(self) -> int:
        """Events that have not reached MLflow."""
        with self._lock:
            try:
                with open(self.path, "rb") as file:
                    file.seek(self.sent_bytes)
                    return sum(line.endswith(b"\n") for line in file) + len(self._memory)
            except OSError:
                return len(self._memory)

    def close(self) -> None:
        """Sync and release; the lock goes with the file."""
        for file in (self._file, self._lock_file):
            if file is not None:
                with contextlib.suppress(OSError):
                    os.fsync(file.fileno())
                with contextlib.suppress(OSError):
                    file.close()
        self._file = self._lock_file = None


def status_of(events: list[Event]) -> str:
    """ "new" without a start, "running" after one, else the status of the last end."""
    status = "new"
    for event in events:
        if event["op"] == "start" and event["run"] == "child":
            status = "running"
        elif event["op"] == "end" and event["run"] == "child":
            status = event["status"]
    return status
