"""A process's work -> seconds and peak memory by phase, sampled by a thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GIB = 1 << 30
SAMPLED_EVERY_S = 0.02


@dataclass
class Meter:
    """seconds, peaks (GiB of the whole process): by phase, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    current: str = ""
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Meter:
        threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Bill what happens inside to a phase; an inner phase takes over for its time."""
        outer, self.current = self.current, name
        self.seconds.setdefault(name, 0.0)
        self._look(name)
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self._look(name)
            self.seconds[name] += elapsed
            if outer in self.seconds:
                self.seconds[outer] -= elapsed
            self.current = outer

    def phases(self) -> list[dict[str, Any]]:
        return [
            {"name": name, "seconds": round(seconds, 2), "peak_gib": round(self.peaks[name], 3)}
            for name, seconds in self.seconds.items()
        ]

    def _look(self, name: str) -> None:
        self.peaks[name] = max(self.peaks.get(name, 0.0), resident_gib())

    def _sample(self) -> None:
        while not self._over.wait(SAMPLED_EVERY_S):
            if name := self.current:
                self._look(name)


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def peak_gib() -> float:
    """Of this process so far, as the kernel counts it."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def available_gib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / (1 << 20)
