"""The plan's bytes against those that a real training holds; the whole table is `benchmarks/plan_memory.py`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks.plan_memory import CASES, found_ratio
from tests.tiers import long

SHORT = 0
# Rows of the larger model in bfloat16 take minutes on CPUs without instructions for it; `python -m
# benchmarks.plan_memory` measures them all.
TESTED = [i for i, c in enumerate(CASES) if i != SHORT and (c.model == "tiny" or c.dtype == "float32")]


def measured(number: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--one", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_training_holds_what_was_planned():
    entry = measured(SHORT)
    assert found_ratio(entry, "step") == pytest.approx(1, abs=0.1)
    assert found_ratio(entry, "look") == pytest.approx(1, abs=0.1)


@long
@pytest.mark.slow
@pytest.mark.parametrize("number", TESTED)
def test_every_training_of_the_table_does(number):
    entry = measured(number)
    assert found_ratio(entry, "step") == pytest.approx(1, abs=0.1)
    assert found_ratio(entry, "look") == pytest.approx(1, abs=0.1)


def test_the_table_has_every_value_twice():
    assert len(CASES) >= len({SHORT, *TESTED}) >= 8
    for field in ("model", "dtype", "checkpointing", "generations", "shared_prefix"):
        values = [getattr(case, field) for case in CASES]
        assert all(values.count(value) >= 2 for value in set(values))
        assert len(set(values)) == 2
    assert {bool(case.lora) for case in CASES} == {True, False}
