"""An MLflow experiment -> the folders that `compare` reads, so that runs are compared from anywhere.

What `log_training` and an earlier comparison left as artifacts is fetched and written in the formats of training
and evaluation. For each algorithm, seed and variant the newest finished run counts.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.reports.results import ReportError
from appo.storage import write_atomic
from appo.tracking.outputs import TRAINING_FILES

log = logging.getLogger("appo.reports")


@dataclass(frozen=True, slots=True)
class Fetched:
    """Folders as the pipeline's own steps would have left them."""

    runs: tuple[Path, ...]
    evaluations: Path


def fetch_experiment(name: str, out: Path, *, recipe: Recipe, run_dir: Path) -> Fetched:
    """Fetch the finished trainings of an experiment into `out`.

    run_dir: folder of mlflow.db where neither recipe nor environment names a server. Raises ReportError when the
    experiment is unknown, holds no finished training with its files, or nothing in it was evaluated, MlflowAway without
    a store.
    """
    from appo.tracking.tracker import open_kept

    client = open_kept(recipe, run_dir).client
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        known = ", ".join(sorted(e.name for e in client.search_experiments())) or "none"
        raise ReportError(f"experiment {name!r}: unknown in this MLflow store; there are {known}")
    newest: dict[str, Any] = {}
    found = client.search_runs(
        [experiment.experiment_id],
        "tags.`appo.role` = 'training' AND attributes.status = 'FINISHED'",
        order_by=["attributes.start_time ASC"],
    )
    for run in found:
        if folder := _fetch_training(client, run, out / "fetched"):
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            label = summary["algorithm"] + (f".{summary['variant']}" if summary.get("variant") else "")
            newest[f"{label}-seed{summary['seed']}"] = (run, folder)
    if not newest:
        raise ReportError(f"experiment {name!r}: holds no finished training with its files")
    evaluations = out / "evaluation"
    for checkpoint, (run, _) in newest.items():
        _fetch_predictions(client, run, evaluations / checkpoint, prefix="predictions")
    comparisons = client.search_runs(
        [experiment.experiment_id],
        "tags.`appo.role` = 'comparison'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    for run in comparisons:
        _fetch_predictions(client, run, evaluations / "warm_start", prefix="start")
    if not list(evaluations.glob("*/*.metrics.json")):
        raise ReportError(
            f"experiment {name!r}: nothing in it was evaluated; run `appo compare` once on the run's own folders"
        )
    return Fetched(tuple(folder for _, folder in newest.values()), evaluations)


def _fetch_training(client: Any, run: Any, out: Path) -> Path | None:
    """The training's files in a folder named by the run; None when they were never logged."""
    run_id = run.info.run_id
    listed = {artifact.path for artifact in client.list_artifacts(run_id, "training")}
    if not {"training/summary.json", "training/metrics.jsonl"} <= listed:
        log.warning("run %s (%s): has no training files and is left out", run_id, run.info.run_name)
        return None
    folder = out / run_id
    folder.mkdir(parents=True, exist_ok=True)
    for name in TRAINING_FILES:
        if f"training/{name}" in listed:
            write_atomic(
                folder / name, Path(client.download_artifacts(run_id, f"training/{name}")).read_bytes()
            )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    write_atomic(folder / "summary.json", json.dumps({**summary, "mlflow_run_id": run_id}))
    return folder


def _fetch_predictions(client: Any, run: Any, folder: Path, *, prefix: str) -> None:
    """Tables of predictions -> predictions and metrics as an evaluation writes them."""
    for artifact in client.list_artifacts(run.info.run_id, prefix):
        table = json.loads(Path(client.download_artifacts(run.info.run_id, artifact.path)).read_text("utf-8"))
        records = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        benchmark = Path(artifact.path).stem
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{benchmark}.jsonl", "".join(json.dumps(r) + "\n" for r in records))
        accuracy = run.data.metrics.get(
            f"{prefix}/{benchmark}/accuracy", run.data.metrics.get(f"{benchmark}/accuracy")
        )
        if accuracy is None:
            log.warning("run %s: has predictions of %s and no score", run.info.run_id, benchmark)
            continue
        write_atomic(
            folder / f"{benchmark}.metrics.json", json.dumps({"accuracy": accuracy, "items": len(records)})
        )
