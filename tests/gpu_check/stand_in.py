"""A part whose rows end in every way that a row can, to see what the command makes of it. Standard library only."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Measure, Row, failed

GOOD, OUTSIDE, NOT_A_NUMBER = "stand-in: good", "stand-in: outside its bound", "stand-in: not a number"
RAISES, DIES, AFTER, HANGS = (
    "stand-in: raises",
    "stand-in: dies",
    "stand-in: after a death",
    "stand-in: hangs",
)
FOUND = {GOOD: 0.5, OUTSIDE: 2.0, NOT_A_NUMBER: float("nan"), AFTER: 0.25}


def rows(place: Place) -> list[str]:
    return [GOOD, OUTSIDE, NOT_A_NUMBER, RAISES, DIES, AFTER, HANGS]


def run(
    names: Sequence[str], place: Place, began: Callable[[str], None], done: Callable[[Row], None]
) -> None:
    for name in names:
        began(name)
        if name == RAISES:
            done(failed(name, ValueError("boom\nand more")))
        elif name == DIES:
            print("the last words", flush=True)
            os._exit(9)
        elif name == HANGS:
            time.sleep(600)
        else:
            done(Row(name, (Measure("off by", FOUND[name], 1.0), Measure("told", 3.0)), 0.1))
