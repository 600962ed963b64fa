"""A finished training's folder -> its run in MLflow: the manifest it read, files, completions, the
checkpoint.

Numbers of each step were logged while it ran; this is the rest, so that the run can be understood, and
compared again, from MLflow alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from appo.tracking.runlog import Tracker

DATA_FILES = ("card.html", "rejects.jsonl", "leakage.json")  # beside the manifest
TRAINING_FILES = ("summary.json", "metrics.jsonl", "groups.jsonl")


def log_training(tracker: Tracker, out: Path, *, manifest_path: Path, manifest_digest: str) -> None:
    """Log what a training left in `out`. Never raises: a file that is missing or broken is left out, and
    said.
    """
    try:
        summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
        groups = _groups(out / "groups.jsonl")
    except (OSError, ValueError) as error:
        tracker.complain(f"log_training: {error}")
        return
    tracker.log_dataset(
        Path(manifest_path).parent.name, manifest_digest, str(manifest_path), context="training"
    )
    for name in DATA_FILES:
        if (beside := Path(manifest_path).with_name(name)).is_file():
            tracker.log_artifact(beside, "data")
    numbers = {k: v for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    tracker.log_metrics({f"summary/{k}": v for k, v in numbers.items()}, step=int(summary.get("steps", 0)))
    for name in TRAINING_FILES:
        if (out / name).is_file():
            tracker.log_artifact(out / name, "training")
    tracker.log_table(completion_rows(groups), "completions.json")
    if (out / "checkpoint").is_dir():
        # No name of a curve of the steps: a model's metrics are also the run's, and would add a point to it.
        kept = ("crucial_hit_rate_end", "rollout_accuracy_end", "reward_end")
        tracker.log_model(
            f"{summary['algorithm']}-seed{summary['seed']}",
            str((out / "checkpoint").absolute()),
            step=int(summary.get("steps", 0)),
            metrics={k: numbers[k] for k in kept if k in numbers},
            tags={"appo.algorithm": summary["algorithm"], "appo.seed": summary["seed"]},
        )


def completion_rows(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each completion of the kept groups, as the page of a run browses them."""
    rows = []
    for group in groups:
        for index, text in enumerate(group["completions"]):
            rewards = {f"reward/{name}": values[index] for name, values in group.get("rewards", {}).items()}
            rows.append(
                {
                    "step": group.get("step"),
                    "sample": group.get("sample_id"),
                    "question": group.get("question"),
                    "completion": text,
                    **rewards,
                    "frames": str((group.get("psi") or [None] * (index + 1))[index]),
                    "crucial frames": str(group.get("crucial_frames", [])),
                    "key frames": str(group.get("key_frames", [])),
                }
            )
    return rows


def _groups(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
