"""Workers that hang, die, or eat memory: the task is named, the others are done, the order is kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from appo.data.workers import Failure, WorkerPool


def doubler() -> Callable[[int], int]:
    return lambda number: 2 * number


def misbehaving(bad: dict[int, str]) -> Callable[[int], int]:
    def work(number: int) -> int:
        match bad.get(number):
            case "hang":
                time.sleep(3600)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "raise":
                raise ValueError(f"task {number} is bad")
            case "memory":
                bytearray(64 << 30)
            case "slow":
                time.sleep(0.3)
        return 2 * number

    return work


def pool(make: Callable[[], Callable[[int], int]], **changes: float) -> WorkerPool[int, int]:
    settings = {"workers": 2, "timeout_s": 20.0, "memory_gib": 2.0, **changes}
    return WorkerPool(make, **settings)  # type: ignore[arg-type]


def test_results_keep_the_order_of_the_tasks() -> None:
    with pool(partial(misbehaving, {0: "slow", 7: "slow"})) as workers:
        assert list(workers.run(range(100))) == [(number, 2 * number) for number in range(100)]


def test_pool_can_run_twice_and_nothing() -> None:
    with pool(doubler) as workers:
        assert list(workers.run([])) == []
        assert list(workers.run([1, 2])) == [(1, 2), (2, 4)]


def test_bad_tasks_are_named_and_the_rest_is_done() -> None:
    bad = {3: "segfault", 5: "exit", 8: "raise", 11: "memory"}
    with pool(partial(misbehaving, bad)) as workers:
        results = dict(workers.run(range(30)))
    assert {n for n, r in results.items() if isinstance(r, Failure)} == set(bad)
    assert "SIGSEGV" in results[3].reason
    assert "exit code 3" in results[5].reason
    assert results[8].reason == "task 8 is bad"
    assert "data.worker_memory_gib" in results[11].reason
    assert all(results[n] == 2 * n for n in range(30) if n not in bad)


def test_a_hang_costs_its_deadline_and_no_more() -> None:
    start = time.monotonic()
    with pool(partial(misbehaving, {4: "hang"}), timeout_s=1.5) as workers:
        results = dict(workers.run(range(20)))
    assert "more than 1.5 s" in results[4].reason
    assert all(results[n] == 2 * n for n in range(20) if n != 4)
    assert time.monotonic() - start < 15


def test_back_pressure() -> None:
    """The source of tasks is never read further ahead than the window, though the first task blocks the
    output.
    """
    asked = []

    def tasks():
        for number in range(200):
            asked.append(number)
            yield number

    with pool(partial(misbehaving, {0: "slow"}), window=10) as workers:
        for number, _ in workers.run(tasks()):
            assert len(asked) <= number + 10


def broken_start() -> Callable[[int], int]:
    raise ImportError("no decoder here")


def test_workers_that_cannot_start_stop_the_run() -> None:
    with pool(broken_start) as workers, pytest.raises(RuntimeError, match="no decoder here"):
        list(workers.run([1]))


def test_workers_end_with_the_pool() -> None:
    with pool(doubler) as workers:
        list(workers.run([1]))
        processes = [worker.process for worker in workers._workers]
    assert all(process.poll() is not None for process in processes)
