"""A recipe -> every stage one after another, each a process of its own, and what it took beside what was planned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.errors import SettingError, UserError
from appo.modeling.architecture import architecture_of
from appo.modeling.sizes import Architecture
from appo.rehearsal.meter import GIB, available_gib
from appo.rehearsal.smaller import COMPLETIONS, TOKENS, planned, rehearsed

STAGES = ("build", "train", "rollout_vllm", "evaluate")
# Of a process that trains or serves, before it holds a tensor: torch, transformers, TRL, vLLM.
PROGRAMS_GIB = 1.5
# On the disk, of the weights: as built, and with adapters merged.
COPIES = 2.2


class RehearsalError(UserError, RuntimeError):
    """A stage that did not come to its end: its name and its last lines."""


@dataclass(frozen=True, slots=True)
class Phase:
    """seconds; peak_gib: of the whole process meanwhile; both None where it was left out, for the reason in `skipped`.
    planned_gib: of tensors, as `appo plan` counts them for one process on a CPU; None where it has no line for it.
    """

    name: str
    seconds: float | None
    peak_gib: float | None
    planned_gib: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """peak_gib: of the largest process, as the kernel counts it. estimates: which figures are no measurements of a run,
    and why.
    """

    recipe: str
    parameters: int
    layers: int
    phases: tuple[Phase, ...]
    peak_gib: float
    estimates: tuple[str, ...] = ()

    def to_json(self) -> str:
        values = asdict(self)
        for phase in values["phases"]:
            if phase["skipped"] is None:
                del phase["skipped"]
        return json.dumps(values)


def rehearse(recipe: Recipe, *, layers: int | None = None, progress: bool = True) -> Rehearsal:
    """Run every stage in a folder that is removed afterwards.

    layers: decoder layers to build, None for all. Raises SettingError for what cannot be rehearsed or does not fit this
    machine, UnknownArchitecture, and RehearsalError.
    """
    architecture = _architecture(recipe, layers)
    path = str(recipe.model.path)
    _refuse_what_does_not_fit(rehearsed(recipe, path), architecture)
    with tempfile.TemporaryDirectory(prefix="appo-rehearse-") as folder:
        small = rehearsed(recipe, Path(folder) / "model")
        phases: list[dict[str, Any]] = []
        facts: dict[str, Any] = {}
        for stage in STAGES:
            if progress:
                print(f"> {stage}", file=sys.stderr, flush=True)
            found = _run(stage, small, Path(folder), {"layers": layers, "model": path})
            phases += found.pop("phases")
            facts |= found | {"peak_gib": max(facts.get("peak_gib", 0.0), found["peak_gib"])}
    plan = planned(rehearsed(recipe, path), architecture, facts.get("prompt"))
    return Rehearsal(
        recipe.name,
        facts["parameters"],
        architecture.text.layers,
        tuple(Phase(**phase, planned_gib=plan.get(phase["name"])) for phase in phases),
        round(facts["peak_gib"], 2),
        _estimates(facts),
    )


def table(found: Rehearsal) -> str:
    """What people read: one line a phase, then the whole."""
    lines = [f"{found.recipe}: {found.parameters:,} parameters, {found.layers} decoder layers", ""]
    lines.append(f"  {'phase':<16}{'seconds':>9}{'peak GiB':>10}{'planned':>9}")
    for phase in found.phases:
        if phase.skipped:
            lines.append(f"  {phase.name:<16}left out: {phase.skipped}")
            continue
        planned_gib = "-" if phase.planned_gib is None else f"{phase.planned_gib:.2f}"
        lines.append(f"  {phase.name:<16}{phase.seconds:>9.1f}{phase.peak_gib:>10.2f}{planned_gib:>9}")
    total = sum(phase.seconds or 0.0 for phase in found.phases)
    lines.append(f"  {'all':<16}{total:>9.1f}{found.peak_gib:>10.2f}")
    return "\n".join(
        [*lines, "", "estimates, not measurements of a run:", *(f"* {note}" for note in found.estimates)]
    )


def _architecture(recipe: Recipe, layers: int | None) -> Architecture:
    """The recipe's, with as many decoder layers as are built."""
    if recipe.model.path is None:
        raise SettingError(
            "model.path=null: the warm start's tiny model needs no rehearsal; name a model, e.g. "
            "--set model.path=Qwen/Qwen2.5-VL-3B-Instruct"
        )
    found = architecture_of(recipe.model.path)
    if layers is None:
        return found
    if not 1 <= layers <= found.text.layers:
        raise SettingError(
            f"--layers {layers}: {recipe.model.path} has {found.text.layers}; give 1 to all of them"
        )
    return replace(found, text=replace(found.text, layers=layers))


def _refuse_what_does_not_fit(recipe: Recipe, architecture: Architecture) -> None:
    """Before anything is built. recipe: as rehearsed."""

    def needed(layers: int) -> float:
        less = replace(architecture, text=replace(architecture.text, layers=layers))
        return max(planned(recipe, less, None).values()) + PROGRAMS_GIB

    depth, free = architecture.text.layers, available_gib()
    if needed(depth) > free:
        possible = next((n for n in range(depth - 1, 0, -1) if needed(n) <= free), None)
        raise SettingError(
            f"{recipe.model.path}: {needed(depth):.1f} GiB of memory are needed for {depth} layers, "
            f"{free:.1f} are free; "
            + (f"build fewer with --layers {possible}" if possible else "take a machine with more")
        )
    place = tempfile.gettempdir()
    space, weights = shutil.disk_usage(place).free / GIB, architecture.parameters.total * 2 * COPIES / GIB
    if weights > space:
        raise SettingError(
            f"{place}: {weights:.1f} GiB are needed for checkpoints, {space:.1f} are free; set TMPDIR to another folder"
        )


def _estimates(facts: dict[str, Any]) -> tuple[str, ...]:
    prompt = facts["prompt"]
    text = prompt["tokens"] - prompt["visual"]
    return (
        f"the prompt's {prompt['tokens']:,} tokens: {prompt['visual']:,} visual ones are the run's own, {text} of text "
        "are not, since the tokenizer is a byte-level one that was made from this one text",
        f"completions: {COMPLETIONS} of at most {TOKENS} tokens; seconds and memory of rollouts and updates grow "
        "with both",
        "seconds are of this CPU; peaks of a whole process, its programs (about 1 GiB) and loaded files included; "
        "planned are tensors alone, as `appo plan` counts them for this one process",
        *facts.get("notes", ()),
    )


def _run(stage: str, recipe: Recipe, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One stage in a process of its own; what it measured."""
    job = folder / f"{stage}.json"
    job.write_text(
        json.dumps({"recipe": recipe.to_json(), "folder": str(folder), **options}), encoding="utf-8"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "appo.rehearsal.stages", stage, str(job)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    result = folder / f"{stage}.result.json"
    if done.returncode or not result.is_file():
        killed = "; it was killed, for want of memory as a rule" if done.returncode == -9 else ""
        last = "\n".join(done.stdout.strip().splitlines()[-4:])
        raise RehearsalError(f"{stage}: ended with status {done.returncode}{killed}:\n{last}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
