"""Runs the parts in processes of their own, as many at once as the machine has cores, until a deadline.

A row that raises is a failed row; a process that dies takes the row that it was at, and another goes on with the rest.
Standard library only.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu_check.parts import Part, Place
from benchmarks.gpu_check.rows import Row, failed

POLL_S, SIGN_OF_LIFE_S = 0.2, 20.0


@dataclass(slots=True)
class Job:
    """A part at work. waiting: rows without a result, in order; under_way: those of them that have begun."""

    part: Part
    place: Place
    waiting: list[str]
    under_way: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    read: int = 0  # bytes of the results
    settled: int = 0  # rows that this process brought to an end

    @property
    def results(self) -> Path:
        return self.place.path / "results.jsonl"

    @property
    def log(self) -> Path:
        return self.place.path / "output.txt"

    def start(self, env: Mapping[str, str]) -> None:
        self.place.path.mkdir(parents=True, exist_ok=True)
        place = json.dumps(asdict(self.place))
        worker = [
            sys.executable,
            "-m",
            "benchmarks.gpu_check.worker",
            self.part.module,
            place,
            str(self.results),
        ]
        self.under_way.clear()
        self.settled = 0
        with self.log.open("ab") as log:
            # A session of its own: what it starts ends with it.
            self.process = subprocess.Popen(
                [*worker, *self.waiting], env=dict(env), stdout=log, stderr=log, start_new_session=True
            )

    def news(self) -> list[Row]:
        """Rows that ended since the last call."""
        if not self.results.exists():
            return []
        with self.results.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        ended = []
        for line in whole.decode("utf-8").splitlines():
            said = json.loads(line)
            if "began" in said:
                self.under_way.append(said["began"])
            else:
                ended.append(Row.from_json(said["row"]))
        for row in ended:
            self._settle(row.name)
        return ended

    def _settle(self, name: str) -> None:
        self.settled += 1
        self.waiting.remove(name)
        if name in self.under_way:
            self.under_way.remove(name)

    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def lost(self) -> list[Row]:
        """Rows that the ended process took along: those under way, or all where it did not come to any."""
        assert self.process is not None  # it has ended
        names = list(self.under_way) or ([] if self.settled else list(self.waiting))
        status = self.process.returncode
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        rows = [failed(name, f"its process {how}: {self._last_words()}") for name in names]
        for name in names:
            self._settle(name)
        return rows

    def _last_words(self) -> str:
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        )
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def stop(self) -> None:
        if self.process is not None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.process.wait()


def jobs_of(
    parts: Sequence[Part], device: str, folder: Path, threads: int, wanted: Callable[[str], bool]
) -> list[Job]:
    """One for each part that has rows that are wanted."""
    jobs = []
    for part in parts:
        place = Place(device, str(folder / part.name), threads)
        names = [name for name in importlib.import_module(part.module).rows(place) if wanted(name)]
        if names:
            jobs.append(Job(part, place, names))
    return jobs


def run(
    jobs: Sequence[Job], env: Mapping[str, str], *, cores: int, until: float, tell: Callable[[Row], None],
    alive: Callable[[list[str]], None],
) -> list[Row]:  # fmt: skip
    """All rows, in the order of the jobs. until: `time.monotonic()` at which what still runs is stopped.

    tell: called with each row as it ends. alive: called now and then with the rows under way.
    """
    order = [name for job in jobs for name in job.waiting]
    found: dict[str, Row] = {}
    heard = time.monotonic()
    started = time.monotonic()

    def end(rows: Sequence[Row]) -> None:
        for row in rows:
            found[row.name] = row
            tell(row)

    try:
        while len(found) < len(order):
            _start_what_fits(jobs, env, cores)
            time.sleep(POLL_S)
            for job in jobs:
                news = job.news()
                end(news)
                heard = time.monotonic() if news else heard
                if job.ended():
                    end(job.news())  # written between the look and the end
                    if job.waiting:
                        end(job.lost())
                    job.stop()
                    job.process = None
            if time.monotonic() > until:
                break
            if time.monotonic() - heard > SIGN_OF_LIFE_S:
                heard = time.monotonic()
                alive([name for job in jobs for name in job.under_way])
    finally:
        for job in jobs:
            job.stop()
    for job in jobs:
        end(job.news())
    late = f"not done within {time.monotonic() - started:.0f} s"
    end([failed(name, late) for name in order if name not in found])
    return [found[name] for name in order]


def _start_what_fits(jobs: Sequence[Job], env: Mapping[str, str], cores: int) -> None:
    for job in jobs:
        running = [other.part for other in jobs if other.process is not None]
        if job.process is not None or not job.waiting or any(part.alone for part in running):
            continue
        busy = sum(part.processes for part in running)
        if not running or (not job.part.alone and busy + job.part.processes <= cores):
            job.start(env)
