"""What each step of a pipeline does, in terms of the library: plain arguments in, a `Done` out.

The components call these and decide nothing; the command line calls them for single steps. An expected mistake ends
the process of a step in its lines. A step computes in a folder of this machine (the storage root itself, or a scratch
folder when storage is S3), then publishes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appo import checks, hub, plan
from appo.config import Recipe, RecipeError
from appo.errors import ends_in_lines
from appo.folders import Mirror, fetch_folder, local_folder
from appo.handover import Done, Place, checkpoint_of, file_of, numbers
from appo.plan import Training
from appo.startup import UNUSED_BY_TRAINING, heavy_imports, leave_out
from appo.storage import (
    StorageError,
    StoreError,
    open_binary,
    read_bytes,
    sha256_of,
    write,
    write_atomic,
)


@ends_in_lines
def validate(recipe: str, overrides: Sequence[str], variants: Sequence[str] = ()) -> Recipe:
    """The first step: whatever the checks can find here is refused, before data are read or a GPU is taken.

    Raises CheckFailed with all problems, RecipeError for a recipe that cannot be read.
    """
    resolved = plan.resolve(recipe, overrides)
    hub.hub_name(resolved.model.path or "")  # refuses what can be no revision
    checks.refuse(checks.here(resolved, variants), checks.able_here())
    resolved = _with_fingerprint(resolved)
    print(
        f"recipe {resolved.name} ({resolved.digest}): {', '.join(resolved.algorithms)} "
        f"x seeds {', '.join(map(str, resolved.training.seeds))}"
    )
    return resolved


def _with_fingerprint(recipe: Recipe) -> Recipe:
    """The recipe with the digest of its records, so that new records are new work in every later step."""
    if recipe.data.annotations is None:
        return recipe
    try:
        with open_binary(recipe.data.annotations) as records:
            found = sha256_of(records)[:16]
    except StorageError as error:
        if Path(recipe.data.annotations).is_dir():  # a source that reads several files checks them itself
            return recipe
        raise RecipeError(f"data.annotations={recipe.data.annotations!r}: {error}") from error
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"fingerprint": found})})


@ends_in_lines
def assemble(recipe: Recipe, storage: str) -> Done:
    """Videos and questions -> the manifest that every later step reads."""
    from appo.data.assemble import assemble as assemble_data

    place = Place(plan.layout(recipe, storage).data)
    made = assemble_data(recipe, place.local)
    place.publish()
    counts = _counts(made.counts)
    return Done(
        location=place.of(made.manifest),
        metadata={"rejects": place.of(made.rejects), **counts},
        metrics={name: float(count) for name, count in counts.items()},
        text=Path(made.card).read_text(encoding="utf-8"),
    )


@ends_in_lines
def base_model(recipe: Recipe, storage: str, *, manifest: str) -> Done:
    """The weights that every training starts from: the recipe's checkpoint, or a warm start made here."""
    if recipe.model.path is not None:
        location = _pinned(recipe.model.path, f"{plan.layout(recipe, storage).base}/base_model.json")
        told = hub.told(location)
        print(f"base model: {told['model']}" + (f", commit {told['commit']}" if told["commit"] else ""))
        return Done(location=location, metadata={"made_here": False, **_given(told)}, text=location)
    leave_out("deepspeed")  # as trainings do
    with heavy_imports(without=UNUSED_BY_TRAINING):
        from appo.training.warm_start import warm_start

    place = Place(plan.layout(recipe, storage).base)
    if not (place.local / "summary.json").is_file():
        summary = warm_start(recipe, file_of(manifest), place.local)
        write_atomic(place.local / "summary.json", json.dumps(summary, indent=2, default=str))
        place.publish()
    summary = json.loads((place.local / "summary.json").read_text(encoding="utf-8"))
    return Done(
        location=place.location,
        metadata={"made_here": True},
        metrics=numbers(summary),
        text=json.dumps(summary, indent=2),
    )


def _pinned(path: str, record: str) -> str:
    """`path`; of a name on the hub, with the commit that this run looked up, now or when it was begun.

    record: where the commit is written down. A run that is continued would otherwise train on other weights than it
    began with.
    """
    asked = hub.hub_name(path)
    if asked is None:
        return path
    try:
        commit = str(json.loads(read_bytes(record))["commit"])
    except StoreError:
        raise
    except StorageError:  # not written yet: the run's first look
        commit = hub.commit_of(asked)
        write(record, json.dumps({"model": asked.repo, "revision": asked.revision, "commit": commit}) + "\n")
    return str(hub.HubName(asked.repo, commit))


def _given(values: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


@ends_in_lines
def features(recipe: Recipe, *, manifest: str, model: str) -> Done:
    """The features of every video, computed once before trainings that would each compute them."""
    from appo.modeling.feature_files import nothing_to_fill

    if reason := nothing_to_fill(recipe):
        print(f"nothing to fill: {reason}")
        return Done(location="", metadata={"filled": False}, text=f"nothing to fill: {reason}")
    with heavy_imports():
        from appo.training.feature_fill import fill
    from appo.data.manifest import read_manifest

    filled = fill(recipe, read_manifest(file_of(manifest)), checkpoint_of(model))
    return Done(
        location=str(recipe.training.feature_cache_dir),
        metadata={"filled": True, "revision": filled.revision},
        metrics=numbers(asdict(filled)),
        text=str(filled),
    )


@ends_in_lines
def train(recipe: Recipe, storage: str, training: Training, *, manifest: str, model: str) -> Done:
    """One algorithm with one seed; continues from its newest whole checkpoint, and is not repeated when
    finished.
    """
    place = Place(plan.layout(recipe, storage).training(training))
    if int(os.environ.get("PET_NODE_RANK", "0")) > 0:  # the first pod publishes
        _train(recipe, storage, training, place.local, file_of(manifest), model)
        return Done(location=place.location)
    with Mirror(place.local, place.location):
        if not (place.local / "summary.json").is_file():
            _train(recipe, storage, training, place.local, file_of(manifest), model)
            _name_variant(place.local / "summary.json", training)
    place.publish()
    return trained(recipe, storage, training)


@ends_in_lines
def trained(recipe: Recipe, storage: str, training: Training) -> Done:
    """What a finished training tells the next steps, read from where it published."""
    location = plan.layout(recipe, storage).training(training)
    summary = json.loads(read_bytes(f"{location}/summary.json"))
    return Done(
        location=location,
        metadata={"algorithm": training.algorithm, "seed": training.seed, "name": training.name},
        metrics=numbers(summary),
        text=json.dumps(summary, indent=2),
    )


def _name_variant(path: Path, training: Training) -> None:
    """The summary says which variant of an ablation it is; reports keep variants apart by it."""
    if training.variant:
        summary = json.loads(path.read_text(encoding="utf-8"))
        write_atomic(path, json.dumps({**summary, "variant": training.variant}, indent=2) + "\n")


def _train(
    recipe: Recipe, storage: str, training: Training, out: Path, manifest_path: Path, model: str
) -> None:
    """In this process, or on every GPU of this pod and of the TrainJob's other pods. model: its location."""
    from appo.data.manifest import read_manifest
    from appo.training.launch import launch

    machines = _Machines.seen()
    checks.before_training(recipe, algorithm=training.algorithm, processes=machines.processes)
    common: dict[str, Any] = {
        "algorithm": training.algorithm,
        "seed": training.seed,
        "manifest_path": manifest_path,
        "model_path": checkpoint_of(model),
        "model_name": model,
        "out": out,
    }
    tracking = {
        "run_dir": str(local_folder(storage)),
        "model": model,
        "manifest_digest": read_manifest(manifest_path).digest,
        "journals": str(out / "tracking"),
    }
    if machines.processes > 1:
        launch(
            recipe,
            processes=machines.processes,
            machines=machines.count,
            rank=machines.rank,
            address=machines.address,
            tracking=tracking,
            **common,
        )
        return
    from appo.tracking import log_training, start_training
    from appo.training.run import train as run_training

    tracker = start_training(
        recipe,
        Path(tracking["run_dir"]),
        algorithm=training.algorithm,
        seed=training.seed,
        model=model,
        manifest_digest=tracking["manifest_digest"],
        journals=out / "tracking",
    )
    with tracker:
        run_training(recipe, tracker=tracker, **common)
        log_training(tracker, out, manifest_path=manifest_path, manifest_digest=tracking["manifest_digest"])


@dataclass(frozen=True, slots=True)
class _Machines:
    """The pods of a TrainJob as torchrun's variables tell them (PET_*); one machine without them."""

    count: int
    rank: int
    address: str | None
    processes: int

    @classmethod
    def seen(cls) -> _Machines:
        import torch

        count = int(os.environ.get("PET_NNODES", "1"))
        asked = os.environ.get("PET_NPROC_PER_NODE", "")
        here = int(asked) if asked.isdigit() else torch.cuda.device_count() or 1
        rank = int(os.environ.get("PET_NODE_RANK", "0"))
        return cls(count, rank, os.environ.get("PET_MASTER_ADDR"), here * count)


@ends_in_lines
def evaluate(
    recipe: Recipe,
    storage: str,
    *,
    manifest: str,
    base: str,
    runs: Sequence[Mapping[str, Any]],
    base_name: str = "warm_start",
) -> Done:
    """All checkpoints through one engine; predictions and scores kept item by item.

    base: what the trainings are compared with, as `base_name`; "" for nothing.
    """
    from appo.evaluation.run import evaluate as run_evaluation

    place = Place(plan.layout(recipe, storage).evaluation)
    wanted = base and (recipe.evaluation.warm_start_too or base_name != "warm_start")
    checkpoints = {base_name: checkpoint_of(base)} if wanted else {}
    checkpoints |= {str(run["name"]): str(fetch_folder(str(run["location"])) / "checkpoint") for run in runs}
    # Predictions leave a pod while they are made: a new pod continues at the first item without one.
    with Mirror(place.local, place.location):
        results = run_evaluation(
            recipe,
            checkpoints=checkpoints,
            manifest_path=file_of(manifest),
            out=place.local,
            base=lambda: checkpoint_of(base) if base else None,
        )
    place.publish()
    scores = {
        f"{name}/{benchmark}/accuracy": float(metrics["accuracy"])
        for name, benchmarks in results.items()
        for benchmark, metrics in benchmarks.items()
        if "accuracy" in metrics
    }
    return Done(location=place.location, metrics=scores, text=json.dumps(results, indent=2, default=str))


@ends_in_lines
def compare(
    recipe: Recipe, storage: str, *, manifest: str, runs: Sequence[Mapping[str, Any]], evaluations: str
) -> Done:
    """Seeds -> means and deviations, ratios, plots, one page; printed, and logged to MLflow."""
    from appo.reports.compare import compare as run_comparison

    place = Place(plan.layout(recipe, storage).report)
    folders = [fetch_folder(str(run["location"])) for run in runs]
    made = run_comparison(
        folders,
        fetch_folder(evaluations),
        place.local,
        recipe=recipe,
        manifest_path=file_of(manifest),
        run_dir=local_folder(storage),
    )
    write_atomic(place.local / "table.txt", made.table)
    place.publish()
    print(f"{made.table}\nreport: {place.of(Path(made.html))}")
    return Done(
        location=place.of(Path(made.html)),
        text=Path(made.html).read_text(encoding="utf-8"),
        markdown=Path(made.markdown).read_text(encoding="utf-8"),
    )


def _counts(tables: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """`{"split": {"train": 9}}` -> `{"split/train": 9}`."""
    return {f"{table}/{name}": count for table, counts in tables.items() for name, count in counts.items()}
