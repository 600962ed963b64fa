"""System metrics: real samples of this machine, and a GPU library that is a stand-in (there is no GPU here)."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appo.config import Recipe
from appo.tracking import start_training, system


class NVMLError(Exception):
    pass


class Nvml(SimpleNamespace):
    """Two GPUs; the second is a MIG slice, which knows its memory and not its load."""

    NVMLError = NVMLError

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=2**30, total=2**32)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        if handle == 1:
            raise NVMLError("Not Supported")
        return SimpleNamespace(gpu=97)


def test_gpus_are_sampled_and_one_that_tells_little_takes_nothing_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "_gpu_handles", lambda: [(Nvml(), 0), (Nvml(), 1)])
    seen: list[tuple[dict[str, float], int]] = []
    enough = threading.Event()

    def log(values: dict[str, float], *, step: int) -> None:
        seen.append((values, step))
        if len(seen) == 2:
            enough.set()

    sampler = system.SystemMetrics(log, began_ms=int(time.time() * 1000) - 5000, period_s=0.01)
    assert enough.wait(20)
    sampler.stop()
    values, step = seen[0]
    assert 5 <= step < 60
    assert values["system/gpu_0_utilization_percentage"] == 97
    assert values["system/gpu_1_memory_usage_megabytes"] == 1024
    assert values["system/gpu_1_memory_usage_percentage"] == 25
    assert "system/gpu_1_utilization_percentage" not in values
    assert values["system/process_memory_usage_megabytes"] > 1


def test_a_resumed_trainings_curve_goes_on_where_it_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt is moved an hour into the past, in the journal, as if a pod came back late."""
    began: list[int] = []

    class Sampler:
        def __init__(self, log: Any, *, began_ms: int) -> None:
            began.append(began_ms)

        def stop(self) -> None:
            pass

    monkeypatch.setattr(system, "SystemMetrics", Sampler)

    def attempt(seed: int = 0) -> None:
        start_training(
            recipe, tmp_path, algorithm="appo", seed=seed, model="warm", manifest_digest="d" * 64
        ).end("FAILED", "node lost")

    attempt()
    (journal,) = tmp_path.rglob("*seed0.jsonl")
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    hour_ago = began[0] - 3_600_000
    for event in events:
        event["time_ms"] -= 3_600_000
    # As the journal writes them: its cursor counts bytes.
    lines = [json.dumps(event, separators=(",", ":")) + "\n" for event in events]
    journal.write_text("".join(lines))
    attempt()
    attempt(seed=1)  # another run begins at its own zero
    assert began[1] == hour_ago
    assert began[2] > began[0]
