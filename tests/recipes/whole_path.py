"""A shipped recipe through every step of its pipeline, and what must be true of what the steps left."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from appo import plan, steps
from appo.config import Recipe, load_recipe
from appo.data.manifest import read_manifest
from tests.cpu_layouts import lifted
from tests.recipes.replaceable import PROCESSES, STEPS, outside, processes_of, replacements, told
from tests.recipes.sets import MadeSet
from tests.recipes.watching import watched

Sets = tuple[dict[str, MadeSet], Path]
TYPES = {"bfloat16": "BF16", "float32": "F32"}


def prepared(name: str, made: Sets, model: Path | None) -> tuple[Recipe, Recipe]:
    """(shipped, as it runs here), through the pipeline's first step. Fails for a difference that is not allowed."""
    shipped = load_recipe(name)
    sets, benchmarks = made
    source = shipped.data.source
    overrides = replacements(
        shipped,
        made=None if source == "key_moment" else sets[source],
        benchmarks=benchmarks,
        model=model,
    )
    with lifted():
        recipe = steps.validate(name, overrides)
    print(told(shipped, recipe))
    assert outside(shipped, recipe) == []
    return shipped, recipe


def assembled(recipe: Recipe, folder: Path) -> Any:
    done = steps.assemble(plan.assembly_recipe(recipe), str(folder))
    return done, read_manifest(Path(done.location))


@dataclass(frozen=True)
class Run:
    """What a recipe's steps left. seen: by algorithm, what each process noted in its first step."""

    shipped: Recipe
    recipe: Recipe
    manifest: Any
    base: steps.Done
    trainings: list[steps.Done]
    seen: dict[str, list[dict[str, Any]]]
    evaluation: steps.Done
    report: steps.Done


def run(name: str, made: Sets, model: Path | None, storage: Path, tracking: str) -> Run:
    """All steps of the pipeline in their order; says how long each took, and how much of a processor."""
    shipped, recipe = prepared(name, made, model)
    took: list[str] = []

    def timed(step: str, do: Callable[[], Any]) -> Any:
        began, used = time.perf_counter(), _cpu_s()
        found = do()
        took.append(f"{step} {time.perf_counter() - began:.0f} ({_cpu_s() - used:.0f})")
        return found

    place = str(storage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking)
        done, manifest = timed("assemble", lambda: assembled(recipe, storage))
        told_of = {"manifest": done.location}
        base = timed("base_model", lambda: steps.base_model(plan.base_recipe(recipe), place, **told_of))
        trainings = []
        with watched(
            recipe.training.distributed, min(PROCESSES, processes_of(shipped)), storage / "seen"
        ) as seen:
            for one in plan.trainings(recipe):
                if one.seed == recipe.training.seeds[0]:
                    train = partial(steps.train, recipe, place, one, model=base.location, **told_of)
                    trainings.append(timed(f"train {one.algorithm}", train))
        runs = [{**one.metadata, "location": one.location} for one in trainings]
        scored = timed(
            "evaluate", lambda: steps.evaluate(recipe, place, base=base.location, runs=runs, **told_of)
        )
        compare = partial(steps.compare, recipe, place, runs=runs, evaluations=scored.location, **told_of)
        report = timed("compare", compare)
    print(f"{name}, seconds on the wall (and of CPU): {', '.join(took)}")
    return Run(shipped, recipe, manifest, base, trainings, seen(), scored, report)


def _cpu_s() -> float:
    """Of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def check_trainings(run: Run) -> None:
    """Each algorithm trained on all processes, in the recipe's layout and type, and published in that type."""
    shipped = run.shipped
    processes = min(PROCESSES, processes_of(shipped))
    assert set(run.seen) == set(shipped.algorithms)
    for done in run.trainings:
        algorithm, folder = done.metadata["algorithm"], Path(done.location)
        noted = run.seen[algorithm]
        assert [one["processes"] for one in noted] == [processes] * processes
        for one in noted:
            check_layout(one, shipped)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["steps"], summary["processes"]) == (STEPS, processes)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for line in lines:
            assert math.isfinite(line["loss"])
            assert math.isfinite(line["grad_norm"])
        if shipped.model.path is not None:  # the stand-in's answers are right now and then
            assert any(line["grad_norm"] > 0 for line in lines)
            assert any(line["rewards/accuracy/std"] > 0 for line in lines)
        if algorithm == "appo":
            assert all("appo/crucial_frames" in line for line in lines)
        # The look before and after: the same prompts, all of a group's completions.
        groups = [json.loads(line) for line in (folder / "groups.jsonl").read_text().splitlines()]
        assert {group["step"] for group in groups} == {0, STEPS}
        assert all(len(group["rewards"]["accuracy"]) == shipped.policy.num_generations for group in groups)
        assert set(published_types(folder / "checkpoint")) == {TYPES[shipped.model.dtype]}
        assert (folder / "checkpoint" / "adapter_config.json").exists() == (shipped.model.lora is not None)
        base = json.loads((folder / "checkpoint" / "base_model.json").read_text())
        assert base == {"model": run.base.location, "commit": None}


def check_layout(noted: dict[str, Any], shipped: Recipe) -> None:
    """tests.cpu_layouts.assert_ran has looked at the shards; this is what it looked at."""
    layout = shipped.training.distributed
    assert noted["layout"] == layout
    assert noted["adapters"] == (shipped.model.lora is not None)
    assert noted["checkpointing"] == shipped.training.gradient_checkpointing
    assert noted["completions"] == shipped.policy.num_generations
    assert noted["completion_tokens"] == shipped.policy.max_completion_length
    assert noted["learning_rate"] == shipped.training.learning_rate
    if layout == "fsdp2":
        assert "FSDPModule" in noted["policy"]
        assert noted["distributed"] == "FSDP"
    elif layout.startswith("zero"):
        assert "DeepSpeedEngine" in noted["wrapped"]
        assert noted["distributed"] == "DEEPSPEED"
    elif noted["processes"] > 1:
        assert "DistributedDataParallel" in noted["wrapped"]
    if not layout.startswith("zero"):
        assert noted["trained"] == ["torch.float32"]  # masters, or adapters


def published_types(checkpoint: Path) -> list[str]:
    """The type of every tensor of a checkpoint, as its files say."""
    found = []
    for path in checkpoint.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        found += [about["dtype"] for name, about in header.items() if name != "__metadata__"]
    return found


def check_evaluation(run: Run) -> None:
    """Every benchmark of the recipe, on every checkpoint and on what they started from: no item without an answer."""
    names = {"warm_start", *(done.metadata["name"] for done in run.trainings)}
    for name in names:
        for benchmark in run.shipped.evaluation.benchmarks:
            file = Path(run.evaluation.location) / name / f"{benchmark}.jsonl"
            header, *items = [json.loads(line) for line in file.read_text().splitlines()]
            assert header["dtype"] == run.shipped.model.dtype
            assert header["video"] == run.shipped.video.model_dump(mode="json")
            decoding = run.shipped.evaluation.model_dump(mode="json")
            assert header["decoding"].items() <= decoding.items()
            assert items
            assert all(item["response"] is not None for item in items)
            observes = run.shipped.data.template == "observation"
            grounds = benchmark == "nextgqa"
            own = benchmark == "key_moment"
            template = "grounding" if grounds else "observation" if observes else "reasoning"
            assert header["template"] == (run.shipped.data.template if own else template)


def check_report(run: Run, tracking: str) -> None:
    from mlflow.tracking import MlflowClient

    assert Path(run.report.location).is_file()
    numbers = json.loads((Path(run.report.location).parent / "numbers.json").read_text())
    assert set(numbers["methods"]) == set(run.shipped.algorithms)
    for method in numbers["methods"].values():
        assert set(method["accuracy"]) == set(run.shipped.evaluation.benchmarks)
    client = MlflowClient(tracking)
    experiment = client.get_experiment_by_name(run.shipped.tracking.experiment)
    runs = client.search_runs(
        [experiment.experiment_id],
        f"tags.`appo.recipe` = '{run.shipped.name}' and tags.`appo.role` = 'training'",
    )
    assert {one.data.tags["appo.algorithm"] for one in runs} == set(run.shipped.algorithms)
    assert {one.info.status for one in runs} == {"FINISHED"}
