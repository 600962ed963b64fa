"""The journal keeps order, survives a torn line and a full disk, and knows its owner."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appo.tracking.journal import Journal, JournalBusy, status_of


def numbers(events: list[dict]) -> list[int]:
    return [event["n"] for event in events]


def test_events_come_back_in_order_across_processes(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    for n in range(5):
        journal.append({"n": n})
    events, cursor = journal.pending(3)
    journal.commit(cursor, {"child": "abc"})
    journal.close()
    again = Journal(tmp_path / "run.jsonl")
    assert (numbers(events), numbers(again.pending(10)[0]), again.ids) == (
        [0, 1, 2],
        [3, 4],
        {"child": "abc"},
    )
    assert again.unsent == 2


def test_a_lost_cursor_sends_again_and_never_skips(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    journal.append({"n": 0})
    journal.commit(journal.pending(10)[1], {})
    journal.close()
    (tmp_path / "run.cursor").write_text("{torn")
    assert numbers(Journal(tmp_path / "run.jsonl").pending(10)[0]) == [0]


def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps({"n": 0}) + "\n" + '{"n": 1, "val')
    journal = Journal(path)
    journal.append({"n": 2})
    assert numbers(journal.pending(10)[0]) == [0, 2]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "run.jsonl")
    with pytest.raises(JournalBusy, match="another process"):
        Journal(tmp_path / "run.jsonl")
    first.close()
    Journal(tmp_path / "run.jsonl").close()


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """The kernel refuses every byte of a file past `size`, mid-line too, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_events_in_memory_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run.jsonl")
    with full_after(200):
        for n in range(100):
            journal.append({"n": n})
    journal.append({"n": 100})  # room again: still behind those that wait
    assert 0 < journal.spilled < 101
    sent: list[int] = []
    while (batch := journal.pending(7))[0]:
        sent += numbers(batch[0])
        journal.commit(batch[1], {})
    assert sent == list(range(101))
    journal.append({"n": 101})
    assert all(json.loads(line)["n"] in (*range(101), 101) for line in (tmp_path / "run.jsonl").open())
    assert numbers(journal.pending(7)[0]) == [101]


def test_status_follows_starts_and_ends() -> None:
    start, end = {"op": "start", "run": "child"}, {"op": "end", "run": "child", "status": "FAILED"}
    assert [status_of(e) for e in ([], [start], [start, end], [start, end, start])] == [
        "new",
        "running",
        "FAILED",
        "running",
    ]
