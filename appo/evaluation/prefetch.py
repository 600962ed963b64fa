"""Jobs -> their results in order, worked on ahead in threads: videos are decoded while others are
generated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Keeps `ahead` jobs going or done. Use as a context manager: leaving it drops what was not taken."""

    def __init__(self, jobs: Iterable[Callable[[], T]], *, workers: int, ahead: int):
        self._jobs = iter(jobs)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._queue: deque[Future[T]] = deque()
        self._ahead = max(ahead, workers)

    def take(self, *, wait: bool) -> T | None:
        """The next result; None when all are taken, or, without `wait`, when the next is not ready yet.

        Raises what the job raised; the one after it can then be taken.
        """
        self._fill()
        if not self._queue or not (wait or self._queue[0].done()):
            return None
        result = self._queue.popleft().result()
        self._fill()
        return result

    def _fill(self) -> None:
        while len(self._queue) < self._ahead:
            job = next(self._jobs, None)
            if job is None:
                return
            self._queue.append(self._pool.submit(job))

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
