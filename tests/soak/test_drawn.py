"""The soaks' own machinery: cases come again from their seed and number, end in time, and name their repetition."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from tests.soak.drawn import SOAKS, drawn, under_way

FOLDER = Path(__file__).parent


def first(count: int, name: str, **how: object) -> list[float]:
    return [draw.random() for draw, _ in zip(drawn(name, minutes=1e6, **how), range(count), strict=False)]  # type: ignore[arg-type]


def test_a_seed_and_a_number_mean_a_case() -> None:
    ours = first(5, "test_kills", seed=3, only=None)
    assert ours == first(5, "test_kills", seed=3, only=None)
    assert len({*ours, *first(5, "test_kills", seed=4, only=None)}) == 10
    assert not set(ours) & set(first(5, "test_recipes", seed=3, only=None))
    assert [draw.random() for draw in drawn("test_kills", seed=3, only="4")] == ours[4:]


def test_the_time_bounds_them_and_one_runs_whatever_it_is() -> None:
    assert len(list(drawn("test_kills", seed=0, only=None, minutes=0))) == 1
    assert len(list(drawn("test_kills", seed=0, only=None, minutes=0.004))) > 1


def test_what_repeats_a_case_is_printed_before_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cases = drawn("test_packings", seed=7, only="5")
    next(cases)
    command = "APPO_SEED=7 APPO_SOAK_CASE=5 make soak ARGS='-k test_packings'"
    assert command in capsys.readouterr().out
    assert under_way == [command]
    assert not list(cases)
    assert under_way == []


def test_every_soak_takes_its_share_of_the_time() -> None:
    used = [
        name
        for path in FOLDER.glob("test_*.py")
        for name in re.findall(r"drawn\(\"(\w+)\"\)", path.read_text())
    ]
    assert sorted(used) == sorted(SOAKS)
    names = [
        name
        for path in FOLDER.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    for name in SOAKS:  # `-k` must find one test
        assert sum(name in found for found in names) == 1


def test_cases_do_not_touch_the_global_generator() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    first(3, "test_kills", seed=0, only=None)
    assert random.random() == expected
