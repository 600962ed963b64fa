"""Tasks -> results in their order, by worker processes that may be killed.

A decoder can hang or die on a broken file, in C, where no exception reaches; so each worker is a process of
its own with a deadline a task and a memory cap, and is replaced when it misses one. Back-pressure: a task
starts only when it is less than `window` ahead of the oldest unfinished one, so memory does not grow with the
number of tasks.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from appo.errors import UserError, one_line

Task = TypeVar("Task")
Result = TypeVar("Result")
READY = -1  # in place of a task's number: the worker has started
START_TIMEOUT_S = 120.0  # of an interpreter and its imports, on the slowest of disks
QUEUED = 2  # tasks a worker holds: one at work, one to go on with


class WorkerError(UserError, RuntimeError):
    """A decoding worker that cannot start at all: the setting, and the worker's own reason."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A task without a result: the worker raised, died or missed its deadline. fatal: not for a reason of its
    own, so that the tasks behind it would fail too."""

    reason: str
    fatal: bool = False


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    held: deque[int] = field(default_factory=deque)  # task numbers, the one at work first
    deadline: float = float("inf")
    ready: bool = False  # its imports are done: time counts from here


class WorkerPool(Generic[Task, Result]):
    """`make()` is called once in each worker and gives the function that turns a task into a result.

    Both must be importable by name, since workers are new interpreters: forking would copy the parent's
    threads and memory, and `multiprocessing` would import the parent's main module again (kfp's, for one).
    workers: how many processes; timeout_s: seconds a task may take; memory_gib: address space a worker may
    map.
    """

    def __init__(
        self,
        make: Callable[[], Callable[[Task], Result | Failure]],
        *,
        workers: int,
        timeout_s: float,
        memory_gib: float,
        window: int | None = None,
    ):
        self._make, self._timeout_s, self._memory_gib = make, timeout_s, memory_gib
        self._window = window or 8 * workers
        self._most, self._workers = workers, list[_Worker]()  # started when there is work for them

    def __enter__(self) -> WorkerPool[Task, Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers:
            _stop(worker)

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Result | Failure]]:
        """Every task with its result, in the order of the tasks."""
        source = enumerate(tasks)
        waiting: dict[int, Task] = {}
        results: dict[int, Result | Failure] = {}
        again: deque[int] = deque()  # tasks that were queued behind one that killed its worker
        upcoming, exhausted = 0, False
        while True:
            while True:
                if again:
                    number = again.popleft()
                elif not exhausted and (not waiting or len(waiting) < self._window) and self._has_room():
                    try:
                        number, task = next(source)
                    except StopIteration:
                        exhausted = True
                        break
                    waiting[number] = task
                else:
                    break
                self._give(self._freest(), number, waiting[number])
            if not waiting:
                return
            self._collect(results, again)
            while upcoming in results:
                yield waiting.pop(upcoming), results.pop(upcoming)
                upcoming += 1

    def _has_room(self) -> bool:
        return len(self._workers) < self._most or any(len(w.held) < QUEUED for w in self._workers)

    def _freest(self) -> _Worker:
        """The worker with the least to do; a new one rather than one that is busy."""
        freest = min(self._workers, key=lambda worker: len(worker.held), default=None)
        if freest is None or (freest.held and len(self._workers) < self._most):
            freest = self._start()
            self._workers.append(freest)
        return freest

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from appo.data.workers import serve; serve({theirs.fileno()})"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # FFmpeg's complaints about broken files come back as reasons; on the screen they would hide
                # the bar.
                stderr=subprocess.DEVNULL,
            )
        pipe = Connection(ours.detach())
        pipe.send((self._make, self._memory_gib))
        return _Worker(process, pipe, deadline=time.monotonic() + START_TIMEOUT_S)

    def _give(self, worker: _Worker, number: int, task: Task) -> None:
        if not worker.held and worker.ready:
            worker.deadline = time.monotonic() + self._timeout_s
        worker.held.append(number)
        # A worker that died: `_collect` reads the end of its pipe.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            worker.pipe.send((number, task))

    def _collect(self, results: dict[int, Result | Failure], again: deque[int]) -> None:
        """Take what has arrived, waiting for at most the next deadline; replace workers that died or are
        late.
        """
        busy = [worker for worker in self._workers if worker.held]
        patience = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        ready = set(wait([worker.pipe for worker in busy], timeout=patience))
        for worker in busy:
            if worker.pipe in ready:
                try:
                    number, result = worker.pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._replace(worker, _death(worker.process.wait(timeout=30)), results, again)
                    continue
                if number is None:
                    raise WorkerError(
                        f"data.worker_memory_gib={self._memory_gib:g}: a decoding worker could not start: "
                        f"{one_line(result)}; raise it where memory is what it lacked"
                    )
                if number == READY:
                    worker.ready = True
                else:
                    assert number == worker.held.popleft()
                    results[number] = result
                worker.deadline = time.monotonic() + self._timeout_s if worker.held else float("inf")
            elif time.monotonic() >= worker.deadline:
                reason = (
                    f"took more than {self._timeout_s:g} s to decode (data.decode_timeout_s) and was stopped"
                )
                self._replace(worker, reason, results, again)

    def _replace(
        self, worker: _Worker, reason: str, results: dict[int, Result | Failure], again: deque[int]
    ) -> None:
        guilty, *innocent = worker.held
        results[guilty] = Failure(reason)
        again.extend(innocent)
        _stop(worker)
        self._workers[self._workers.index(worker)] = self._start()


def _stop(worker: _Worker) -> None:
    worker.pipe.close()
    worker.process.kill()
    worker.process.wait()


def _death(exit_code: int) -> str:
    if exit_code < 0:
        return f"the decoder process died of {signal.Signals(-exit_code).name}"
    return f"the decoder process died with exit code {exit_code}"


def serve(descriptor: int) -> None:
    """The worker's life: read a task, answer, until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with Connection(descriptor) as pipe:
        try:
            make, memory_gib = pipe.recv()
            limit = int(memory_gib * 2**30)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            function = make()
            pipe.send((READY, None))
        except Exception as error:
            pipe.send((None, f"{type(error).__name__}: {error}"))
            return
        try:
            while True:
                number, task = pipe.recv()
                pipe.send((number, _answer(function, task, memory_gib)))
        except (EOFError, ConnectionResetError, BrokenPipeError):
            return


def _answer(function: Callable[[Any], Any], task: Any, memory_gib: float) -> Any:
    try:
        return function(task)
    except MemoryError:
        return Failure(f"needs more than {memory_gib:g} GiB to decode (data.worker_memory_gib)")
    except Exception as error:  # whatever a decoder raises becomes this task's reason
        return Failure(str(error) or type(error).__name__)
