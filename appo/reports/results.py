"""Folders that trainings and evaluations left -> typed results, checked on the way in.

The first step of every report. A file that is missing or broken is an error that names it, never a hole in a
table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.errors import UserError, one_line

# The order of every table and legend; what is not named here comes after, by name.
ORDER = ("grpo", "dapo", "appo", "pa_grpo")
LABELS = {"grpo": "GRPO", "dapo": "DAPO", "appo": "APPO", "pa_grpo": "PA-GRPO", "warm_start": "warm start"}
START_NAMES = ("warm_start", "start", "base", "base_model")
_CHECKPOINT = re.compile(r"^(?P<label>[a-z_]+(?:\.[\w-]+)?)[-_/]seed[-_]?(?P<seed>\d+)$")


class ReportError(UserError, ValueError):
    """Outputs that cannot be compared; names the file, what is wrong, and the remedy."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """One training's folder. steps: the lines of metrics.jsonl; groups: those of groups.jsonl.

    label: the algorithm, with the ablation's variant behind a dot where there is one ("appo.hard").
    """

    label: str
    algorithm: str
    seed: int
    folder: Path
    summary: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    groups: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.label}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Item:
    """One question as one checkpoint answered it. score in [0, 1]; accuracy is its mean."""

    id: str
    score: float
    answer: str
    parsed: str | None
    completion: str
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One checkpoint on one benchmark."""

    checkpoint: str
    benchmark: str
    metrics: dict[str, float]
    items: tuple[Item, ...] = field(default=(), repr=False)

    @property
    def accuracy(self) -> float:
        return self.metrics["accuracy"]


def label_name(label: str) -> str:
    """How a label is printed: "appo.hard" -> "APPO (hard)"."""
    algorithm, _, variant = label.partition(".")
    name = LABELS.get(algorithm, algorithm)
    return f"{name} ({variant})" if variant else name


def ordered(labels: Iterable[str]) -> list[str]:
    """Labels in the order of tables: GRPO, DAPO, APPO, PA-GRPO, others by name."""
    rank = {name: index for index, name in enumerate(ORDER)}
    return sorted(set(labels), key=lambda label: (rank.get(label.partition(".")[0], len(rank)), label))


def read_trainings(folders: Sequence[Path]) -> list[TrainingResult]:
    """Every training that left a summary, in table order.

    Raises ReportError for no folder, a missing or broken file, or the same algorithm and seed twice.
    """
    if not folders:
        raise ReportError("runs: none given; name the output folders of at least one training")
    results = [_read_training(Path(folder)) for folder in folders]
    seen: dict[str, Path] = {}
    for result in results:
        if result.name in seen:
            raise ReportError(
                f"{result.folder}: is {result.name}, and so is {seen[result.name]}; a seed counts once"
            )
        seen[result.name] = result.folder
    rank = {label: index for index, label in enumerate(ordered(r.label for r in results))}
    return sorted(results, key=lambda result: (rank[result.label], result.seed))


def _read_training(folder: Path) -> TrainingResult:
    summary = _read_object(folder / "summary.json", "the training did not finish; run it again")
    for key in ("algorithm", "seed"):
        if key not in summary:
            raise ReportError(f"{folder / 'summary.json'}: {key} is missing; was it written by a training?")
    algorithm = str(summary["algorithm"])
    variant = summary.get("variant")
    groups = folder / "groups.jsonl"
    return TrainingResult(
        label=f"{algorithm}.{variant}" if variant else algorithm,
        algorithm=algorithm,
        seed=int(summary["seed"]),
        folder=folder,
        summary=summary,
        steps=tuple(read_lines(folder / "metrics.jsonl")),
        groups=tuple(read_lines(groups)) if groups.is_file() else (),
    )


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Every `{checkpoint}/{benchmark}.metrics.json` below `folder`, with its predictions where they lie
    beside.

    Raises ReportError when there is none, or one is broken or has no accuracy.
    """
    found = sorted(folder.glob("*/*.metrics.json"))
    if not found:
        raise ReportError(f"{folder}: holds no evaluation ({{checkpoint}}/{{benchmark}}.metrics.json)")
    return [_read_evaluation(path) for path in found]


def _read_evaluation(path: Path) -> Evaluation:
    values = _read_object(path, "evaluate again")
    benchmark = path.name.removesuffix(".metrics.json")
    metrics = {
        k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }
    if "accuracy" not in metrics:
        # The score a benchmark is ranked by stands under its own name where it is no plain accuracy.
        main = values.get("main") or values.get("headline")
        if main not in metrics:
            raise ReportError(f"{path}: accuracy is missing; evaluate again")
        metrics["accuracy"] = metrics[main]
    predictions = path.with_name(f"{benchmark}.jsonl")
    records = read_lines(predictions) if predictions.is_file() else []
    items = tuple(_item(r, predictions) for r in records if r.get("kind") != "header" and _id(r) is not None)
    return Evaluation(path.parent.name, benchmark, metrics, items)


def _id(record: dict[str, Any]) -> Any:
    return next((record[key] for key in ("id", "sample_id", "item_id") if key in record), None)


def _item(record: dict[str, Any], path: Path) -> Item:
    score = next((record[key] for key in ("score", "correct", "accuracy") if key in record), None)
    if score is None and isinstance(record.get("scores"), dict):
        score = record["scores"].get("accuracy")
    if score is None:
        raise ReportError(f"{path}: item {_id(record)!r} has no score; evaluate again")
    parsed = next((record[key] for key in ("parsed", "predicted", "prediction") if key in record), None)
    text = next((record[key] for key in ("completion", "text", "output", "response") if key in record), "")
    return Item(
        id=str(_id(record)),
        score=float(score),
        answer=str(record.get("answer", record.get("gold", ""))),
        parsed=None if parsed is None else str(parsed),
        completion="" if text is None else str(text),
        truncated=bool(record.get("truncated", False)),
    )


def split_checkpoint(name: str) -> tuple[str, int] | None:
    """ "appo-seed1" -> ("appo", 1); None for a name that is no training of a seed (the start, another
    model).
    """
    found = _CHECKPOINT.match(name)
    return (found["label"], int(found["seed"])) if found else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file. A cut-off last line is left out: the process that wrote it was killed there.

    Raises ReportError for a missing file, or a broken line before the last.
    """
    if not path.is_file():
        raise ReportError(f"{path}: is missing; run the step that writes it again")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ReportError(
            f"{path}: is not UTF-8 text ({error.reason}); run the step that writes it again"
        ) from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ReportError(f"{path}: line {number} is not JSON: {error}") from error
    return records


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReportError(f"{path}: is missing; {remedy}") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise ReportError(f"{path}: is not JSON ({one_line(error)}); {remedy}") from error
    if not isinstance(values, dict):
        raise ReportError(f"{path}: must hold an object, found {type(values).__name__}; {remedy}")
    return values
