"""A retraining's evaluations -> keep or replace the champion, with the decision as a file, tags and metrics.

The two steps that a scheduled retraining adds to a comparison: `gate` before anything is trained, `promote`
after champion and challenger were evaluated on the same manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from appo.config import Recipe
from appo.reports.results import Evaluation, ReportError, read_evaluations, split_checkpoint
from appo.storage import write_atomic
from appo.tracking.champion import LEFT, Contender, Decision, ModelVersion, decide, open_registry, unchanged
from appo.tracking.provenance import parameters, provenance_tags

log = logging.getLogger("appo.reports")
CHAMPION_NAME = "champion"  # the checkpoint's name in the evaluation's folder


@dataclass(frozen=True, slots=True)
class Gate:
    """train: whether a retraining has anything to do. champion: the model to evaluate beside the
    challenger.
    """

    train: bool
    reason: str
    champion: ModelVersion | None


def gate(recipe: Recipe, run_dir: Path, manifest_digest: str) -> Gate:
    """Stop early, and successfully, when the data is the champion's own, or that of a version rolled back from."""
    registry = open_registry(recipe, run_dir)
    champion = registry.champion()
    if unchanged(champion, manifest_digest):
        assert champion is not None
        reason = (
            f"nothing to do: the data (manifest {manifest_digest[:12]}) is what champion version "
            f"{champion.version} was "
            "trained on"
        )
        return Gate(False, reason, champion)
    if left := registry.left(manifest_digest):
        reason = (
            f"nothing to do: version {left.version} was trained on this data (manifest {manifest_digest[:12]}) and "
            f"was {left.tags[LEFT]}; `appo champion rollback` would bring it back"
        )
        return Gate(False, reason, champion)
    why = "no champion yet" if champion is None else "the data changed since the champion was trained"
    return Gate(True, f"training a challenger: {why} (manifest {manifest_digest[:12]})", champion)


def promote(
    recipe: Recipe,
    run_dir: Path,
    *,
    algorithm: str,
    checkpoints: Mapping[str, str],
    evaluations: Path,
    manifest_digest: str,
    out: Path,
    margin: float = 0.01,
    benchmark: str | None = None,
) -> Decision:
    """Decide, register, move the alias; write decision.json to `out` and log it to MLflow.

    checkpoints: name ("appo-seed0") -> address of the weights, one for each seed of the challenger.
    evaluations: folder that holds them and, where there is one, the present champion under the
    name "champion". benchmark: the one that decides; default the recipe's first. Raises ReportError when a
    score is missing.
    """
    registry = open_registry(recipe, run_dir)
    champion = registry.champion()
    benchmark = benchmark or recipe.evaluation.benchmarks[0]
    scored = {e.checkpoint: e for e in read_evaluations(evaluations) if e.benchmark == benchmark}
    seeds = _seeds(algorithm, checkpoints, scored, evaluations, benchmark)
    name = _typical(seeds)
    challenger = Contender(checkpoints[name], tuple(e.accuracy for e in seeds.values()), manifest_digest)
    holder = None
    if champion is not None:
        if CHAMPION_NAME not in scored:
            raise ReportError(
                f"{evaluations}: champion version {champion.version} ({champion.uri}) was not evaluated on "
                f"{benchmark}; add it to the checkpoints as {CHAMPION_NAME!r}"
            )
        holder = Contender(champion.uri, (scored[CHAMPION_NAME].accuracy,), manifest_digest)
    decision = decide(challenger, holder, margin=margin)
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "decision.json", decision.to_json())
    run_id = _log(recipe, run_dir, decision, manifest_digest, out)
    tags = {"appo.benchmark": benchmark, "appo.algorithm": algorithm, "appo.checkpoint": name}
    registry.record(decision, challenger, run_id=run_id, tags=tags)
    return decision


def _seeds(
    algorithm: str,
    checkpoints: Mapping[str, str],
    scored: Mapping[str, Evaluation],
    evaluations: Path,
    benchmark: str,
) -> dict[str, Evaluation]:
    """The challenger's evaluations by checkpoint name."""
    found: dict[str, Evaluation] = {}
    for name in checkpoints:
        place = split_checkpoint(name)
        if place is None or place[0] != algorithm:
            raise ReportError(f"checkpoint {name!r}: must be called {algorithm}-seed<number>")
        if name not in scored:
            raise ReportError(
                f"{evaluations}: {name} was not evaluated on {benchmark}; run the evaluation again"
            )
        found[name] = scored[name]
    if not found:
        raise ReportError("checkpoints: none given; name the challenger's")
    return found


def _typical(seeds: Mapping[str, Evaluation]) -> str:
    """The seed nearest to the mean stands for all: the best would win partly by luck, and disappoint."""
    mean = fmean(e.accuracy for e in seeds.values())
    return min(seeds, key=lambda name: (abs(seeds[name].accuracy - mean), name))


def _log(recipe: Recipe, run_dir: Path, decision: Decision, manifest_digest: str, out: Path) -> str | None:
    """The decision as a run of its own: metrics, tag and file."""
    from appo.tracking.tracker import open_tracker

    values = {
        "champion/challenger_mean": decision.challenger_mean,
        "champion/champion_mean": decision.champion_mean,
        "champion/difference": decision.difference,
        "champion/needed": decision.needed,
        "champion/noise": decision.noise,
        "champion/promoted": float(decision.promote),
    }
    with open_tracker(recipe, run_dir, journals=out / "tracking") as tracker:
        tags = {**provenance_tags(recipe, manifest_digest), "appo.role": "decision"}
        tags["appo.decision"] = decision.reason
        tracker.start_child("champion or challenger", tags, parameters(recipe), system_metrics=False)
        tracker.log_metrics({k: v for k, v in values.items() if v is not None}, 0)
        tracker.log_artifact(out / "decision.json")
        return tracker.run_id
