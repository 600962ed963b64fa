"""The trainers' small set and model; the last lines of a soak that failed say how to repeat its case."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.soak.drawn import under_way
from tests.training.conftest import bench, small_set

__all__ = ["bench", "small_set"]

TO_REPEAT = pytest.StashKey[list[str]]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().failed and under_way:
        item.config.stash.setdefault(TO_REPEAT, []).append(under_way.pop())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for command in terminalreporter.config.stash.get(TO_REPEAT, []):
        terminalreporter.write_line(f"to repeat the case that failed: {command}")
