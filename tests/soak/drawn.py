"""Numbered random cases from one seed, until a time is up; the case that fails can be run alone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

from tests.tiers import SOAK_MINUTES

SEED = int(os.environ.get("APPO_SEED", "0"))
ONLY = os.environ.get("APPO_SOAK_CASE")
# The soaks of this folder share the time evenly; the next case begins while there is some left.
SOAKS = ("test_packings", "test_overrides", "test_recipes", "test_kills")

# The command that repeats the case under way.
under_way: list[str] = []


def drawn(
    name: str, *, seed: int = SEED, only: str | None = ONLY, minutes: float = SOAK_MINUTES
) -> Iterator[random.Random]:
    """One generator a case, the same for the same seed and number; the first case runs whatever the time.

    name: of the test, one of SOAKS. only: the one case to run. Prints each case, and how to repeat it, before it runs.
    """
    until = time.monotonic() + 60 * minutes / len(SOAKS)
    number = int(only or 0)
    while True:
        under_way[:] = [f"APPO_SEED={seed} APPO_SOAK_CASE={number} make soak ARGS='-k {name}'"]
        print(f"\n{name}, case {number} of seed {seed}; alone: {under_way[0]}", flush=True)
        yield random.Random(f"{name} {seed} {number}")
        number += 1
        if only is not None or time.monotonic() >= until:
            break
    under_way.clear()
    print(f"{name}: {1 if only is not None else number} cases", flush=True)
