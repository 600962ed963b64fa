"""A training step at the 3B shape, ours against plain: `benchmarks.training_step` with bounds.

Ratios within one run alone: what a machine does in a second is its own affair. On a CPU the shape is the one of
`benchmarks.shapes` for CPUs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Measure, Row, failed

ARMS = ("plain_dapo", "dapo", "appo")
SPEED, MEMORY, APPO = (
    "step: ours against plain, scoring and update",
    "step: memory of ours against plain",
    "step: our APPO against our DAPO, whole step",
)
# Counting says 4.1 at the CPU's shape and 3.5 at 3B; a GPU also pays for bandwidth and launches, and a CPU is shared.
AT_LEAST_AS_FAST = 2.5
# At the CPU's shape every token is chosen by some frame and the head is a sixth of the model: the worst case.
APPO_AT_LEAST = {"cpu": 0.85, "cuda": 0.97}
# Of plain's, above the model and the optimizer's state. At the CPU's shape that is activations; at 3B gradients and the
# rounded weights, the same in both, are most of it.
MEMORY_AT_MOST = {"cpu": 0.4, "cuda": 1.0}
# Of a GPU's free memory, what the plan may fill: it knows the larger part of a step, not the allocator's waste.
FILLED = 0.85
ROUNDS = {"cpu": 2, "cuda": 5}
BUDGET_S = {"cpu": 90, "cuda": 120}


def rows(place: Place) -> list[str]:
    return [SPEED, MEMORY, APPO]


def run(
    names: Sequence[str], place: Place, began: Callable[[str], None], done: Callable[[Row], None]
) -> None:
    for name in names:
        began(name)
    start = time.perf_counter()
    try:
        measures = measure(place)
    except Exception as error:
        for name in names:
            done(failed(name, error, time.perf_counter() - start))
        return
    seconds = time.perf_counter() - start
    for name in names:
        done(Row(name, measures[name], seconds if name == names[0] else 0.0))


def measure(place: Place) -> dict[str, tuple[Measure, ...]]:
    """One comparison of the arms gives all rows."""
    import torch

    from benchmarks import training_step
    from benchmarks.shapes import SHAPES, build_model, resized

    device = torch.device(place.device)
    shape = SHAPES["3b" if place.gpu else "cpu"]
    if place.gpu:
        shape = resized(shape, layers=layers_that_fit(shape, torch.cuda.mem_get_info()[0] * FILLED))
    else:
        # Two wait for one another where a machine has other work, and ratios with them.
        torch.set_num_threads(1)
    args = ["--rounds", str(ROUNDS[place.device]), "--budget-s", str(BUDGET_S[place.device])]
    parsed = training_step._parser().parse_args([*args, "--arms", *ARMS])
    found = training_step.compare(shape, build_model(shape, device), parsed)
    training = {arm: _median(found["rounds"], arm, training_step.TRAINING) for arm in ARMS}
    rollout = statistics.median(
        r[arm]["rollout"] for r in found["rounds"] for arm in ARMS[1:] if "rollout" in r[arm]
    )
    size = Measure("layers", shape.layers)
    peaks = found["peak_mib"]
    # Rollouts of both are the same code; one of their seconds stands for both, or their noise would be the figure.
    whole = [rollout + training[arm] for arm in ("dapo", "appo")]
    return {
        SPEED: (
            Measure(
                "our DAPO times as fast",
                _ratio(found["rounds"], "dapo"),
                AT_LEAST_AS_FAST,
                at_most=False,
            ),
            Measure("our APPO", _ratio(found["rounds"], "appo"), AT_LEAST_AS_FAST, at_most=False),
            Measure("counted", found["counted"]["plain_dapo"] / found["counted"]["dapo"]),
            Measure("plain DAPO", training["plain_dapo"], unit=" s"),
            size,
        ),
        MEMORY: (
            Measure("share", peaks["appo"] / peaks["plain_dapo"], MEMORY_AT_MOST[place.device]),
            Measure("ours", peaks["appo"], unit=" MiB"),
            Measure("plain", peaks["plain_dapo"], unit=" MiB"),
            size,
        ),
        APPO: (
            Measure("samples a second", whole[0] / whole[1], APPO_AT_LEAST[place.device], at_most=False),
            Measure("our DAPO", whole[0], unit=" s"),
            Measure("attention and weights", training["appo"] - training["dapo"], unit=" s"),
            size,
        ),
    }


def _median(rounds: Sequence[dict[str, Any]], arm: str, phases: Sequence[str]) -> float:
    return statistics.median(sum(r[arm].get(phase, 0.0) for phase in phases) for r in rounds)


def _ratio(rounds: Sequence[dict[str, Any]], arm: str) -> float:
    """How many times as fast as plain, within a round."""
    from benchmarks.training_step import TRAINING

    def seconds(timed: dict[str, float]) -> float:
        return sum(timed.get(phase, 0.0) for phase in TRAINING)

    return statistics.median(seconds(r["plain_dapo"]) / seconds(r[arm]) for r in rounds)


def layers_that_fit(shape: Any, free_bytes: float) -> int:
    """The most of the shape's decoder layers with which plain's step is planned to fit. Raises RuntimeError for none."""
    for layers in range(shape.layers, 0, -1):
        if planned_bytes(shape, layers) <= free_bytes:
            return layers
    raise RuntimeError(
        f"{free_bytes / 2**30:.1f} GiB are free for it, and one layer of the 3B shape needs "
        f"{planned_bytes(shape, 1) / 2**30:.1f}; free the GPU's memory"
    )


def planned_bytes(shape: Any, layers: int) -> float:
    """What the plan says that plain's hungriest moment holds, rollouts of transformers included."""
    from appo.planning.memory import largest, moments
    from appo.planning.setting import Load, Setting
    from benchmarks.counting import architecture
    from benchmarks.shapes import resized

    sized = resized(shape, layers=layers)
    setting = Setting(
        architecture=architecture(sized),
        dtype=shape.dtype,
        layout="ddp",
        processes=1,
        rank=0,
        targets=(),
        checkpointing=shape.checkpointing,
        shared_prefix=False,
        trains_tower=False,
        features_kept=False,
        rollout="transformers",
        rollout_bytes=2.0**60,
        reference=False,
        reads_attention=False,
        scores_first=True,
        probe_bytes=64 * 2**20,
        engine_share=0.0,
    )
    size = shape.generations
    load = Load(
        groups=shape.groups,
        members=size,
        group_size=size,
        rows=shape.groups * size,
        micro_batches=1,
        prompt=shape.prompt,
        visual=shape.visual_tokens,
        grids=(shape.grid,),
        completion=shape.completion,
        frames=shape.frames // 2,
        looked_at=1,
    )
    return largest(moments(setting, load)).total
