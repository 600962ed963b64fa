"""Predictions and annotations -> metrics: the whole of `appo score`, and the last step of `appo evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from appo.evaluation.benchmarks import Benchmark, BenchmarkError, ItemScore, benchmark_class
from appo.evaluation.benchmarks.nextgqa import NExTGQA, SpanRule
from appo.evaluation.predictions import Prediction, TimeFormat, read_predictions

Metrics = dict[str, Any]
# Names of metrics with an @ are the publishers'; MLflow and Kubeflow refuse the sign.
_REFUSED = {"@": "_at_"}


def score(
    name: str,
    *,
    annotations: Path,
    predictions: Path,
    split: str | None = None,
    time_format: str = "tags",
    span_rule: str = "hull",
) -> Metrics:
    """Score a prediction file, ours or not; every item of the split counts, predicted or not.

    Returns `{"benchmark", "split", "items", "accuracy", rates, "parsers", "official": {...}, "paper":
    {...}}`, values in [0, 1]. Raises BenchmarkError (unknown benchmark or split), AnnotationError or
    PredictionError with file, line and reason.
    """
    kind = benchmark_class(name)
    for option, value, allowed in (
        ("--time-format", time_format, get_args(TimeFormat)),
        ("--span-rule", span_rule, get_args(SpanRule)),
    ):
        if value not in allowed:
            raise BenchmarkError(f"{option} {value}: must be one of {', '.join(allowed)}")
    if time_format == "span" and not issubclass(kind, NExTGQA):
        raise BenchmarkError(f"--time-format span: {kind.name} asks for no times; only nextgqa does")
    benchmark = kind.load(Path(annotations), check_split(kind, split))
    if isinstance(benchmark, NExTGQA):
        benchmark.span_rule = cast(SpanRule, span_rule)
    ids = [item.id for item in benchmark.items]
    found = read_predictions(Path(predictions), ids, time_format=cast(TimeFormat, time_format))
    return metrics_of(benchmark, score_items(benchmark, found))


def check_split(kind: type[Benchmark], split: str | None) -> str:
    """The split asked for, or the benchmark's first. Raises BenchmarkError for one it does not have."""
    if split is None:
        return kind.splits[0]
    if split not in kind.splits:
        raise BenchmarkError(f"--split {split}: {kind.name} has {', '.join(kind.splits)}")
    return split


def score_items(benchmark: Benchmark, predictions: Mapping[str, Prediction]) -> list[ItemScore]:
    """A score for every item of the benchmark, in its order."""
    return [benchmark.score(item, predictions.get(item.id)) for item in benchmark.items]


def metrics_of(benchmark: Benchmark, scores: Sequence[ItemScore]) -> Metrics:
    """Averages as the publisher takes them, with the shares of items that count as wrong unread."""
    total = len(scores)
    variants = benchmark.aggregate(scores)
    shares = {
        f"{status}_rate": sum(score.status == status for score in scores) / total
        for status in ("missing", "truncated", "unparsed")
    }
    return {
        "benchmark": benchmark.name,
        "split": benchmark.split,
        "items": total,
        "accuracy": benchmark.headline(variants),
        **shares,
        "parsers": benchmark.parsers(),
        **variants,
    }


def flat(metrics: Metrics) -> dict[str, float]:
    """The numbers alone, `variant/metric` for nested ones, under names that MLflow and Kubeflow take."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": v for inner, v in flat(dict(value)).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            for sign, plain in _REFUSED.items():
                name = name.replace(sign, plain)
            found[name] = value
    return found
