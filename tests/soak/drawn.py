"""Numbered random cases from one seed, until a time is up; the case that fails can be run alone."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

from tests.tiers import SOAK_MINUTES

SEED = int(os.environ.get("APPO_SEED", "0"))
ONLY = os.environ.get("APPO_SOAK_CASE")
# The tests of this folder share the time evenly.
TESTS = 4


def drawn(name: str) -> Iterator[random.Random]:
    """One generator a case, the same for the same seed and number. Prints each before it runs, and how to repeat it."""
    until = time.monotonic() + 60 * SOAK_MINUTES / TESTS
    number = 0 if ONLY is None else int(ONLY)
    while number == 0 or ONLY is not None or time.monotonic() < until:
        repeat = f"APPO_SEED={SEED} APPO_SOAK_CASE={number} make soak ARGS='-k {name}'"
        print(f"\n{name}, case {number} of seed {SEED} (alone: {repeat})", flush=True)
        yield random.Random(f"{name} {SEED} {number}")
        if ONLY is not None:
            return
        number += 1
    print(f"{name}: {number} cases", flush=True)
