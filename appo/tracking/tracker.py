"""A recipe and a folder -> a tracker for this process, and the MLflow store that it sends to.

The door of the room: where the store is, which run is whose parent, and what a training's run carries from its
first moment. `runlog` holds the tracker itself.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from appo import hub
from appo.tracking.provenance import comparison_digest, parameters, provenance_tags
from appo.tracking.runlog import Tracker
from appo.tracking.sink import MlflowAway, MlflowSink

if TYPE_CHECKING:
    from appo.config import Recipe


def tracking_uri(recipe: Recipe, run_dir: Path) -> str:
    """The recipe's URI, else the injected MLFLOW_TRACKING_URI, else a SQLite file in the run folder."""
    injected = os.environ.get("MLFLOW_TRACKING_URI")
    return recipe.tracking.uri or injected or f"sqlite:///{(run_dir / 'mlflow.db').absolute()}"


def open_sink(recipe: Recipe, run_dir: Path) -> MlflowSink:
    """MLflow as this run sees it; a local SQLite store keeps artifacts beside its file and is locked."""
    return MlflowSink.at(tracking_uri(recipe, run_dir), recipe.tracking.experiment)


def open_kept(recipe: Recipe, run_dir: Path) -> MlflowSink:
    """The same for whoever only reads: a local store must be there already. Raises MlflowAway."""
    uri = tracking_uri(recipe, run_dir)
    file = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not file.is_file():
        raise MlflowAway(
            f"{file}: no MLflow store is there; name the folder of a run with --folder, or a server with "
            "tracking.uri or MLFLOW_TRACKING_URI"
        )
    return open_sink(recipe, run_dir)


def open_tracker(recipe: Recipe, run_dir: Path, *, journals: Path | None = None) -> Tracker:
    """A tracker for this process. Nothing is sent, or imported, before the first start.

    run_dir: folder of the whole run; holds mlflow.db unless recipe or MLFLOW_TRACKING_URI name another store.
    journals: where events are kept until they are sent; default run_dir/tracking.
    """
    run_dir = Path(run_dir)
    return Tracker(functools.partial(open_sink, recipe, run_dir), Path(journals or run_dir / "tracking"))


def start_training(
    recipe: Recipe,
    run_dir: Path,
    *,
    algorithm: str,
    seed: int,
    model: str,
    manifest_digest: str,
    journals: Path | None = None,
) -> Tracker:
    """A tracker with the parent of (algorithm, model, manifest, settings) and this seed's child started.

    model: location of the weights that training starts from, `ORG/NAME@COMMIT` for a name on the hub.
    """
    tracker = open_tracker(recipe, run_dir, journals=journals)
    key = parent_key(recipe, algorithm=algorithm, model=model, manifest_digest=manifest_digest)
    base = hub.told(model)
    tags = {
        **provenance_tags(recipe, manifest_digest),
        "appo.algorithm": algorithm,
        "appo.model": base["model"],
    }
    if base["commit"]:
        tags["appo.model_commit"] = base["commit"]
    params = {
        **parameters(recipe),
        "algorithm": algorithm,
        "model": model,
        "manifest_digest": manifest_digest,
    }
    tracker.start_parent(algorithm, {**tags, "appo.role": "parent"}, params, key=key)
    tracker.start_child(
        f"{algorithm} seed {seed}",
        {**tags, "appo.role": "training", "appo.seed": str(seed), "appo.parent_key": key},
        {**params, "seed": seed},
        key=f"{key}/seed{seed}",
    )
    return tracker


def parent_key(recipe: Recipe, *, algorithm: str, model: str, manifest_digest: str) -> str:
    """What makes runs repetitions of one another; equal keys share a parent run."""
    name = f"{algorithm}|{Path(model).name}|{manifest_digest}|{comparison_digest(recipe)}"
    return f"{algorithm}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
