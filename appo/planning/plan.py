"""A recipe, GPUs and their memory -> whether it fits, what each GPU holds, how long it takes, what would help."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from appo.grouping import cut_groups
from appo.modeling.devices import Device, of_memory
from appo.planning.checkpoints import checkpoints
from appo.planning.hours import ASSUMED, number_of_steps, step_time, training_hours
from appo.planning.memory import Moment, largest, lines, moments
from appo.planning.remedies import candidates, changed
from appo.planning.setting import Load, PlanError, Setting, Undivided, on_cpu, settings_of

if TYPE_CHECKING:
    from appo.config import Recipe

GIB = 2**30
# Of a GPU: CUDA's context, NCCL's buffers and cuBLAS's workspaces, and what the allocator cannot use of the rest.
RESERVED_GIB, UNUSABLE = 1.0, 0.05


@dataclass(frozen=True, slots=True)
class Plan:
    """per_gpu_gib: each line's own peak, and under "total" the largest sum of one moment, which `moment` names.
    checkpoint_gib: the published one; resumable_gib: one with masters and moments; disk_gib, bucket_gib: the most that
    one training leaves of both on a disk and in S3. hours, gpu_hours: of one training. remedy: settings as `--set` takes
    them, with a space between two, that make it fit; None where it fits, or where none does.
    """

    recipe: str
    fits: bool
    gpus: int
    gpu_memory_gib: float
    per_gpu_gib: dict[str, float]
    checkpoint_gib: float
    hours: float
    gpu_hours: float
    remedy: str | None
    assumed: tuple[str, ...]
    moment: str
    resumable_gib: float
    disk_gib: float
    bucket_gib: float
    samples_per_second: float
    trainings: int

    def to_json(self) -> str:
        values = {name: _rounded(getattr(self, name)) for name in self.__dataclass_fields__}
        return json.dumps(values, indent=2, ensure_ascii=False)

    @property
    def usable_gib(self) -> float:
        return usable_gib(self.gpu_memory_gib)


def usable_gib(gpu_memory_gib: float) -> float:
    """What tensors may take of a GPU's memory."""
    return gpu_memory_gib * (1 - UNUSABLE) - RESERVED_GIB


def fit(recipe: Recipe, gpus: int, gpu_memory_gib: float, *, remedies: bool = True) -> Plan:
    """Plan one training of `recipe` on `gpus` GPUs of `gpu_memory_gib` GiB each: its hungriest algorithm.

    Arithmetic only: no torch, nothing asked of the network but an s3:// checkpoint's config.json. Raises PlanError where
    a step cannot be divided over the GPUs, UnknownArchitecture for a model whose sizes cannot be told.
    """
    if not 0 < gpu_memory_gib < float("inf"):
        raise PlanError(f"--gpu-memory {gpu_memory_gib:g}: must be GiB above 0")
    settings, load, assumed = settings_of(recipe, gpus)
    for cut in cut_groups(recipe, gpus):
        raise Undivided(f"{cut}; change it, policy.num_generations, or the number of GPUs")
    device = of_memory(gpu_memory_gib)
    held = _held(settings, load, gpu_memory_gib)
    total = {line: value / GIB for line, value in lines(held).items()}
    problem = _problem(settings, load, total["total"], gpu_memory_gib)
    remedy = None
    if problem and remedies:
        remedy = next(
            (
                " ".join(chosen)
                for chosen in candidates(recipe, gpus)
                if _fits(changed(recipe, chosen), gpus, gpu_memory_gib)
            ),
            None,
        )
    updates = recipe.training.updates_per_rollout
    slowest = max(step_time(setting, load, device).of_update(updates) for setting in settings)
    hours, notes = training_hours(recipe, load, slowest)
    steps, _ = number_of_steps(recipe)
    written = max(
        (checkpoints(s, saves=-(-steps // recipe.training.save_every)) for s in settings),
        key=lambda found: found.resumable,
    )
    trainings = len(recipe.algorithms) * len(recipe.training.seeds)
    moment = largest(held)
    return Plan(
        recipe=recipe.name,
        fits=not problem,
        gpus=gpus,
        gpu_memory_gib=float(gpu_memory_gib),
        per_gpu_gib=total,
        checkpoint_gib=written.published / GIB,
        hours=hours,
        gpu_hours=hours * gpus,
        remedy=remedy,
        assumed=(
            *_memory_notes(recipe, gpu_memory_gib, moment, problem),
            *assumed,
            *_time_notes(device, notes, trainings, hours * gpus),
        ),
        moment=moment.name,
        resumable_gib=written.resumable / GIB,
        disk_gib=written.disk / GIB,
        bucket_gib=written.bucket / GIB,
        samples_per_second=recipe.training.prompts_per_step / slowest,
        trainings=trainings,
    )


def _held(settings: Sequence[Setting], load: Load, gpu_memory_gib: float) -> list[Moment]:
    return [moment for setting in settings for moment in moments(setting, load, gpu_memory_gib * GIB)]


def _fits(recipe: Recipe | None, gpus: int, gpu_memory_gib: float) -> bool:
    """Whether a changed recipe is possible at all, and fits."""
    if recipe is None:
        return False
    try:
        settings, load, _ = settings_of(recipe, gpus)
    except PlanError:
        return False
    if any(cut_groups(recipe, gpus)):
        return False
    total = lines(_held(settings, load, gpu_memory_gib))["total"] / GIB
    return not _problem(settings, load, total, gpu_memory_gib)


def _problem(settings: Sequence[Setting], load: Load, total: float, gpu_memory_gib: float) -> str:
    """Why it does not fit; empty where it does."""
    if total > usable_gib(gpu_memory_gib):
        return (
            f"{total:.1f} GiB are needed, {usable_gib(gpu_memory_gib):.1f} of {gpu_memory_gib:g} can be used"
        )
    share = settings[0].engine_share
    if share:
        needed, given = _engine_gib(settings[0], load), share * gpu_memory_gib
        if given < needed:
            return (
                f"the engine's {given:.1f} GiB (training.vllm_gpu_memory_utilization={share:g}) hold no weights and one "
                f"group, {needed:.1f} GiB"
            )
    return ""


def _engine_gib(setting: Setting, load: Load) -> float:
    """Weights, keys and values of one group, and a pass over one prompt: less, and vLLM does not start or crawls."""
    text, computes = setting.architecture.text, setting.computes
    weights = setting.architecture.parameters.total * computes
    tokens = load.prompt + load.members * load.completion
    cache = tokens * 2 * text.layers * text.keys * computes
    return (weights + cache) / GIB + RESERVED_GIB


def _memory_notes(recipe: Recipe, gpu_memory_gib: float, moment: Moment, problem: str) -> list[str]:
    notes = [
        "every line is its own peak; they do not all come together, and the total is the largest sum of one moment: "
        f"{moment.name}",
        f"of {gpu_memory_gib:g} GiB tensors can use {usable_gib(gpu_memory_gib):.1f}: {RESERVED_GIB:g} GiB for CUDA and "
        f"NCCL, {UNUSABLE:.0%} lost to the allocator",
    ]
    if len(recipe.algorithms) > 1:
        notes.append(f"the hungriest of {', '.join(recipe.algorithms)} in every line")
    if recipe.training.rollout == "vllm_server":
        notes.append("the rollout server has GPUs of its own, which are not counted")
    return [problem, *notes] if problem else notes


def _time_notes(device: Device, notes: Sequence[str], trainings: int, gpu_hours: float) -> list[str]:
    whole = f"; the recipe has {trainings}, {trainings * gpu_hours:,.0f} GPU-hours" if trainings > 1 else ""
    return [
        *notes,
        f"hours are of one training{whole}; evaluation is not counted",
        f"a GPU like {device.name} ({device.bfloat16 / 1e12:g} TFLOPS in bfloat16); {ASSUMED}",
    ]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


__all__ = ["Plan", "PlanError", "fit", "on_cpu", "usable_gib"]
