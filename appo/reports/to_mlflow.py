"""A comparison -> MLflow: mean, deviation and n on the parents, scores and predictions on the children.

MLflow's own pages show no mean over runs; here they stand as metrics of the parent run, where the pages can
sort by them. The report itself becomes an artifact of a run of its own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.reports import speed
from appo.reports.analysis import Analysis, Method
from appo.reports.models import log_model_scores, register_best
from appo.reports.results import Item, TrainingResult
from appo.reports.statistics import SeedSummary
from appo.tracking.provenance import comparison_digest, parameters, provenance_tags

log = logging.getLogger("appo.reports")


def log_comparison(analysis: Analysis, recipe: Recipe, out: Path, run_dir: Path | None) -> None:
    """Write everything; where MLflow cannot be reached the files in `out` stay, and a warning says so.

    run_dir: the folder of a local store; None, and no address in the recipe or the environment: nothing to
    do.
    """
    if run_dir is None and not (recipe.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")):
        log.warning("no MLflow store near %s and none in the recipe; the comparison is in files only", out)
        return
    from appo.tracking.secrets import scrub
    from appo.tracking.tracker import open_sink, open_tracker

    place = run_dir or out
    try:
        sink = open_sink(recipe, place)
        parents = _log_seeds(analysis, sink.client, sink.experiment_id())
    except Exception as error:  # any client, network or database error: the files are written already
        log.warning("MLflow does not have the comparison (%s); it is in %s", scrub(str(error))[:300], out)
        return
    with open_tracker(recipe, place, journals=out / "tracking") as tracker:
        tags = {**provenance_tags(recipe, analysis.manifest_digest), "appo.role": "comparison"}
        tracker.start_child("comparison", tags, parameters(recipe), system_metrics=False)
        for method in analysis.methods:
            tracker.log_metrics(
                {f"{method.label}/{k}": v for k, v in method_metrics(analysis, method).items()}, 0
            )
        tracker.log_metrics({f"start/{b}/accuracy": v for b, v in analysis.start.items()}, 0)
        for benchmark, items in analysis.start_items.items():
            if items:
                tracker.log_table(prediction_rows(items.values()), f"start/{benchmark}.json")
        for name in ("report.html", "report.md", "numbers.json", "flips.csv"):
            tracker.log_artifact(out / name)
        for parent_id in parents:
            log.debug("parent %s carries its seeds' summary", parent_id)


def method_metrics(analysis: Analysis, method: Method) -> dict[str, float]:
    """`{what}_mean`, `_std` (absent for one seed) and `_n` of one method."""
    summaries: dict[str, SeedSummary | None] = {f"{b}/accuracy": s for b, s in method.accuracy.items()}
    summaries |= {
        "samples_per_second": method.throughput,
        "mfu": speed.over_seeds(method, "mfu"),
        "ratio_to_dapo": analysis.ratio_to_dapo(method),
        "crucial_hit_rate_start": method.before,
        "crucial_hit_rate_end": method.after,
    }
    values: dict[str, float] = {}
    for name, summary in summaries.items():
        if summary is not None:
            values |= {f"{name}_mean": summary.mean, f"{name}_n": float(summary.n)}
            if summary.std is not None:
                values[f"{name}_std"] = summary.std
    return values


def _log_seeds(analysis: Analysis, client: Any, experiment_id: str) -> set[str]:
    """Scores onto the children, summaries onto their parents; returns the parents' ids."""
    from mlflow.entities import Metric

    parents: set[str] = set()
    models: dict[str, str] = {}
    now = _now_ms()
    for method in analysis.methods:
        own: set[str] = set()
        for training in method.trainings:
            run = _find(client, training.summary.get("mlflow_run_id")) or _search(
                client, experiment_id, training, comparison_digest(analysis.recipe)
            )
            if run is None:
                continue
            run_id = run.info.run_id
            scores = {
                f"{b}/accuracy": seeds[training.seed]
                for b, seeds in method.by_seed.items()
                if training.seed in seeds
            }
            if scores:
                digest = analysis.manifest_digest
                # A model's metrics are also its run's; without a model the run gets them alone.
                if model_id := log_model_scores(client, run, scores, manifest_digest=digest):
                    models[training.name] = model_id
                else:
                    client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in scores.items()])
            _log_predictions(analysis, client, run_id, method.label, training.seed)
            parent = run.data.tags.get("mlflow.parentRunId")
            # An injected run's parent is the pipeline's, shared by all algorithms: no place for one's mean.
            if parent and run.data.tags.get("appo.parent_key") and _find(client, parent) is not None:
                own.add(parent)
        for parent in own:
            values = method_metrics(analysis, method)
            if len(own) > 1:
                log.warning(
                    "%s has %d parent runs; each gets the summary over all seeds", method.name, len(own)
                )
            client.log_batch(parent, metrics=[Metric(k, v, now, 0) for k, v in values.items()])
        parents |= own
    register_best(client, analysis, models, name=f"{analysis.recipe.tracking.experiment}-best")
    return parents


def prediction_rows(items: Iterable[Item]) -> list[dict[str, Any]]:
    """One row a question, with the columns that the pages show and `experiment` reads back."""
    names = ("id", "answer", "parsed", "score", "truncated", "completion")
    return [{name: getattr(item, name) for name in names} for item in items]


def _log_predictions(analysis: Analysis, client: Any, run_id: str, label: str, seed: int) -> None:
    """One table per benchmark that MLflow's pages can browse and hold against another run's."""
    import json

    for benchmark, labels in analysis.items.items():
        items = labels.get(label, {}).get(seed)
        if not items:
            continue
        name = f"predictions/{benchmark}.json"
        rows = prediction_rows(items.values())
        columns = list(rows[0])
        client.log_dict(run_id, {"columns": columns, "data": [list(r.values()) for r in rows]}, name)
        listed = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": name, "type": "table"}
        if entry not in listed:
            client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*listed, entry]))


def _search(client: Any, experiment_id: str, training: TrainingResult, settings: str) -> Any:
    """A training that ended before MLflow gave its run an id is found by what its tags say; the newest counts."""
    tags = {
        "appo.role": "training",
        "appo.algorithm": training.algorithm,
        "appo.seed": str(training.seed),
        "appo.manifest_digest": training.summary.get("manifest_digest"),
        "appo.comparison_digest": settings,
    }
    wanted = " AND ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items() if value)
    found = client.search_runs(
        [experiment_id], wanted, order_by=["attributes.start_time DESC"], max_results=1
    )
    return found[0] if found else None


def _find(client: Any, run_id: str | None) -> Any:
    """The run, or None when there is none with this id or it was deleted meanwhile."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def _now_ms() -> int:
    import time

    return int(time.time() * 1000)
