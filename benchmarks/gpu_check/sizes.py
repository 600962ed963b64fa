"""A training step at the paper's 3B sizes, ours against plain; and what trainings hold against what `appo plan` says."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.needs import ROOT
from benchmarks.gpu_check.rows import Row

# Full fine-tuning of 3B holds 16 bytes a parameter; a smaller GPU trains adapters.
FULL_FROM_GIB = 100
STEP_S = 150
ARMS = ("plain_dapo", "dapo", "appo")
# Least speed-up over plain DAPO of scoring + update and of a whole step, least samples per second of APPO against
# DAPO, most of plain's peak memory. On a CPU the shape is tiny, and most of a step is not arithmetic.
BOUNDS = {"cuda": (2.0, 1.0, 0.9, 0.8), "cpu": (0.5, 0.5, 0.5, 1.0)}
# Rows of `benchmarks.plan_memory`.
PLANNED = {"cuda": (2, 9, 11), "cpu": (0, 2, 3)}
WITHIN = 0.1


def step_rows(device: str) -> Iterator[Row]:
    """One row: three arms, in turn, with rollouts in one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "step.json"
        command = ["benchmarks.training_step", "--arms", *ARMS, "--rollouts", "1", "--out", str(out)]
        if device == "cuda":
            command += ["--shape", "3b", "--rounds", "3", "--budget-s", str(STEP_S), *_adapters()]
        else:
            command += ["--shape", "tiny", "--dtype", "bfloat16", "--rounds", "5", "--rollouts", "5", "--cpu"]
        _run(command)
        found = json.loads(out.read_text(encoding="utf-8"))
    shape, rounds = found["shape"], found["rounds"]
    training, step, ratio, most = BOUNDS[device]
    row = Row(f"step: {shape['name']}, {shape['layers']} layers, {'LoRA' if shape['lora'] else 'full'}")
    whole = [one for one in rounds if "rollout" in one["dapo"]]
    for arm in ("dapo", "appo"):
        row.bounded(
            f"{arm}: scoring + update, times plain",
            _ratio(rounds, "plain_dapo", arm, _TRAINING),
            least=training,
        )
        row.bounded(f"{arm}: whole step, times plain", _ratio(whole, "plain_dapo", arm, _WHOLE), least=step)
        peaks = found["peak_mib"]
        row.bounded(f"{arm}: of plain's peak memory", peaks[arm] / peaks["plain_dapo"], most=most)
    row.bounded("appo's samples/s of dapo's", _ratio(whole, "dapo", "appo", _WHOLE), least=ratio)
    yield row


def memory_rows(device: str) -> Iterator[Row]:
    """One row a training: its peak, predicted and measured."""
    for number in PLANNED[device]:
        printed = _run(["benchmarks.plan_memory", "--one", str(number)], hide_gpu=device == "cpu")
        entry = json.loads(printed.splitlines()[-1])
        case = entry["case"]
        row = Row(f"memory: {case['model']}, {case['dtype']}, {case['algorithm']}, LoRA {case['lora']}")
        row.figures["MiB measured"] = entry["measured"]["step"] / 2**20
        for what in ("step", "look"):
            predicted = entry["predicted"][what] / entry["measured"][what]
            row.bounded(f"{what}: predicted over measured", predicted, least=1 - WITHIN, most=1 + WITHIN)
        yield row


_TRAINING = ("scoring", "attention", "weights", "update", "optimizer")
_WHOLE = ("rollout", *_TRAINING)


def _ratio(rounds: list[dict[str, Any]], base: str, arm: str, phases: tuple[str, ...]) -> float:
    def seconds(one: dict[str, float]) -> float:
        return sum(one.get(phase, 0.0) for phase in phases)

    return statistics.median(seconds(one[base]) / seconds(one[arm]) for one in rounds)


def _adapters() -> list[str]:
    import torch

    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    return [] if memory >= FULL_FROM_GIB else ["--lora", "16"]


def _run(module: list[str], *, hide_gpu: bool = False) -> str:
    """Raises RuntimeError with the last lines of what failed."""
    command = [*(["env", "CUDA_VISIBLE_DEVICES="] if hide_gpu else []), sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module[0]}: {' / '.join(done.stderr.strip().splitlines()[-3:])}")
    return done.stdout
