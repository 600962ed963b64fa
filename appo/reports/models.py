"""Scores of a comparison -> MLflow's LoggedModels and its registry: each checkpoint with its metrics, the best named.

Registering is a pointer for people who look for a checkpoint to use; what a schedule promotes is decided with a
margin and the seeds' noise, in `promotion`.
"""

from __future__ import annotations

from typing import Any

from appo.reports.analysis import Analysis

BEST = "best"


def log_model_scores(
    client: Any, run: Any, scores: dict[str, float], *, manifest_digest: str | None
) -> str | None:
    """Put the scores of one training's checkpoint onto its LoggedModel; returns the model's id, None without one."""
    found = client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    if not found:
        return None
    model_id = str(found[0].model_id)
    for name, value in scores.items():
        dataset = {
            "dataset_name": name.rpartition("/")[0],
            "dataset_digest": (manifest_digest or "unknown")[:36],
        }
        client.log_metric(run.info.run_id, name, value, step=0, model_id=model_id, **dataset)
    return model_id


def register_best(client: Any, analysis: Analysis, models: dict[str, str], *, name: str) -> str | None:
    """Register the checkpoint with the highest accuracy on the first benchmark under alias `best`.

    models: training name -> id of its LoggedModel. Returns that training's name; None when nothing was scored.
    Registering the same checkpoint again makes no second version.
    """
    from mlflow.exceptions import MlflowException

    benchmark = analysis.main_benchmark
    scored = [
        (method.by_seed[benchmark][training.seed], training.name)
        for method in analysis.methods
        for training in method.trainings
        if training.name in models and training.seed in method.by_seed.get(benchmark, {})
    ]
    if not scored:
        return None
    score, best = max(scored)
    equals = sum(other == score for other, _ in scored)
    model = client.get_logged_model(models[best])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = model.tags.get("appo.uri", best)
    known = [v for v in client.search_model_versions(f"name = '{name}'") if v.source == source]
    version = known[0] if known else client.create_model_version(name, source, run_id=model.source_run_id)
    tags = {
        "appo.checkpoint": best,
        f"{benchmark}.accuracy": f"{score:.6f}",
        "appo.chosen": f"the highest of {len(scored)} on {benchmark}, hence partly luck"
        + (f"; {equals} share this score" if equals > 1 else ""),
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version.version, key, value)
    client.set_registered_model_alias(name, BEST, version.version)
    return best
