"""What a training really holds at most, against what `appo plan` says it will: cases of `benchmarks.plan_memory`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Measure, Row, failed
from benchmarks.plan_memory import ALLOWED, CASES, GPU_CASES, MIB, found_ratio

# Of the cases that the CPU's table in docs/experiments.md has, those in bfloat16 that are quick.
ON_CPU = [number for number, case in enumerate(CASES) if case.model == "tiny" and case.dtype == "bfloat16"]
AT_ONCE_ON_A_GPU = 3  # each counts its own tensors alone


def rows(place: Place) -> list[str]:
    return list(_numbers(place))


def run(
    names: Sequence[str], place: Place, began: Callable[[str], None], done: Callable[[Row], None]
) -> None:
    numbers = _numbers(place)

    def one(name: str) -> None:
        began(name)
        start = time.perf_counter()
        try:
            measures = _measure(numbers[name], place)
            done(Row(name, measures, time.perf_counter() - start))
        except Exception as error:
            done(failed(name, error, time.perf_counter() - start))

    with ThreadPoolExecutor(AT_ONCE_ON_A_GPU if place.gpu else 1) as pool:
        list(pool.map(one, names))


def _numbers(place: Place) -> dict[str, int]:
    cases = GPU_CASES if place.gpu else CASES
    chosen = range(len(cases)) if place.gpu else ON_CPU
    return {f"memory against the plan: {cases[number]}": number for number in chosen}


def _measure(number: int, place: Place) -> tuple[Measure, ...]:
    command = [sys.executable, "-m", "benchmarks.plan_memory", "--one", str(number)]
    command += ["--gpu"] if place.gpu else []
    env = {**os.environ, "OMP_NUM_THREADS": str(place.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"ended with status {done.returncode}")
    entry = json.loads(done.stdout.splitlines()[-1])
    return (
        Measure("predicted off by", abs(found_ratio(entry, "step") - 1), ALLOWED),
        Measure("predicted", entry["predicted"]["step"] / MIB, unit=" MiB"),
        Measure("held", entry["measured"]["step"] / MIB, unit=" MiB"),
        Measure("look predicted off by", abs(found_ratio(entry, "look") - 1)),
    )
