"""Where a step's seconds go: weight_sync (vLLM), rollout, rewards, scoring, attention, weights, update.

In the order of a step; attention is a pass of its own only where no other pass can be read (`perceiving`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


class Phases:
    """Adds up wall seconds by phase; phases may nest, an inner one's time is taken out of the outer one's."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        # Entered with every phase's name beside the clock; a rehearsal measures memory with it.
        self.beside: Callable[[str], AbstractContextManager[Any]] = lambda _: nullcontext()
        self._names: list[str] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._inner.append(0.0)
        self._names.append(name)
        start = _now()
        try:
            with self.beside(name):
                yield
        finally:
            elapsed = _now() - start
            self._names.pop()
            self._seconds[name] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    @property
    def current(self) -> str:
        """The innermost phase under way; empty outside of all."""
        return self._names[-1] if self._names else ""

    def take(self) -> dict[str, float]:
        """Seconds since the last call, by phase name; starts again from zero."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken


def _now() -> float:
    # Device work is queued: without waiting, its time would be billed to whoever waits next.
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
