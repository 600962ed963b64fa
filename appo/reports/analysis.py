"""Trainings and evaluations -> the numbers, tables and honest sentences of a comparison.

Between `results` (files) and `page` (what people open). Knows no HTML.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from appo.config import Recipe
from appo.reports import attention
from appo.reports.results import (
    START_NAMES,
    Evaluation,
    Item,
    TrainingResult,
    label_name,
    ordered,
    read_evaluations,
    read_trainings,
    split_checkpoint,
)
from appo.reports.statistics import PairedDifference, SeedSummary, paired_difference, summarise

# Pairs that the paper compares; further labels (ablations) are compared with DAPO.
_PAIRS = (("appo", "dapo"), ("appo", "grpo"), ("dapo", "grpo"))


# The first steps of a training allocate and choose kernels, and are not timed; the median of fewer than ten
# others still jumps with whatever else the machine does.
_UNTIMED_STEPS, _STEPS_FOR_SPEED = 2, 10


@dataclass(frozen=True, slots=True)
class Method:
    """One algorithm (or variant of it) over its seeds.

    accuracy: by benchmark, after training. before, after: share of groups whose crucial frames hold a true
    key frame; None where the data has no key times. chance: what frames drawn blindly would reach.
    """

    label: str
    trainings: tuple[TrainingResult, ...]
    accuracy: dict[str, SeedSummary]
    by_seed: dict[str, dict[int, float]]
    throughput: SeedSummary | None
    before: SeedSummary | None
    after: SeedSummary | None
    chance: float | None

    @property
    def name(self) -> str:
        return label_name(self.label)

    @property
    def algorithm(self) -> str:
        return self.label.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything that a report says, as numbers."""

    recipe: Recipe
    methods: tuple[Method, ...]
    benchmarks: tuple[str, ...]
    start: dict[str, float]
    differences: tuple[PairedDifference, ...]
    items: dict[
        str, dict[str, dict[int, dict[str, Item]]]
    ]  # benchmark -> label -> seed -> question id -> item
    start_items: dict[str, dict[str, Item]]
    manifest_digest: str | None

    def method(self, label: str) -> Method | None:
        return next((m for m in self.methods if m.label == label), None)

    @property
    def names(self) -> dict[str, str]:
        return {m.label: m.name for m in self.methods}

    @property
    def main_benchmark(self) -> str:
        return self.benchmarks[0]

    @property
    def base_models(self) -> list[dict[str, str | None]]:
        """What the trainings started from, each once: `model`, and `commit` of one on the hub."""
        summaries = [t.summary for m in self.methods for t in m.trainings]
        found = {(s["base_model"], s.get("base_commit")) for s in summaries if s.get("base_model")}
        return [{"model": model, "commit": commit} for model, commit in sorted(found, key=str)]

    @property
    def base(self) -> str:
        """The same in words, of a path its last two folders; empty where no training says it."""
        found = (("/".join(Path(str(o["model"])).parts[-2:]), o["commit"]) for o in self.base_models)
        return ", ".join(f"{model}, commit {commit}" if commit else model for model, commit in found)

    @property
    def seeds(self) -> int:
        """Of the method with the fewest: what a comparison between methods can rest on."""
        return min(len(m.trainings) for m in self.methods)

    def ratio_to_dapo(self, method: Method) -> SeedSummary | None:
        """Samples per second over DAPO's, seed by seed where both have one, else of the means (n=0 seeds
        paired).
        """
        dapo = self.method("dapo")
        if dapo is None:
            return None
        theirs = {t.seed: t.summary.get("samples_per_second") for t in dapo.trainings}
        ratios = [
            t.summary["samples_per_second"] / theirs[t.seed]
            for t in method.trainings
            if theirs.get(t.seed) and t.summary.get("samples_per_second")
        ]
        return summarise(ratios)


def analyse(runs: Sequence[Path], evaluations: Path, recipe: Recipe) -> Analysis:
    """Read and count. Raises ReportError for outputs that are missing, broken or cannot be compared."""
    trainings = read_trainings(runs)
    scored = read_evaluations(Path(evaluations))
    digests = {t.summary.get("manifest_digest") for t in trainings} - {None}
    if len(digests) > 1:
        from appo.reports.results import ReportError

        raise ReportError(
            f"runs: were trained on {len(digests)} different manifests; compare runs of one manifest "
            f"at a time"
        )
    known = {t.name for t in trainings}
    benchmarks = _benchmarks(recipe, scored)
    by_checkpoint = {(e.checkpoint, e.benchmark): e for e in scored}
    labels = ordered(t.label for t in trainings)
    methods = tuple(_method(label, trainings, by_checkpoint, benchmarks) for label in labels)
    start = {e.benchmark: e for e in scored if e.checkpoint in START_NAMES}
    items: dict[str, dict[str, dict[int, dict[str, Item]]]] = {}
    for evaluation in scored:
        place = split_checkpoint(evaluation.checkpoint)
        if place is None or evaluation.checkpoint not in known or not evaluation.items:
            continue
        table = items.setdefault(evaluation.benchmark, {}).setdefault(place[0], {})
        table[place[1]] = {item.id: item for item in evaluation.items}
    return Analysis(
        recipe=recipe,
        methods=methods,
        benchmarks=benchmarks,
        start={name: e.accuracy for name, e in start.items()},
        differences=_differences(labels, items, benchmarks),
        items=items,
        start_items={name: {i.id: i for i in e.items} for name, e in start.items()},
        manifest_digest=str(next(iter(digests))) if digests else None,
    )


def _benchmarks(recipe: Recipe, scored: Sequence[Evaluation]) -> tuple[str, ...]:
    """In the recipe's order, then whatever else was scored."""
    found = {e.benchmark for e in scored}
    first = [name for name in recipe.evaluation.benchmarks if name in found]
    return (*first, *sorted(found - set(first)))


def _method(
    label: str,
    trainings: Sequence[TrainingResult],
    scored: dict[tuple[str, str], Evaluation],
    benchmarks: Sequence[str],
) -> Method:
    own = tuple(t for t in trainings if t.label == label)
    by_seed: dict[str, dict[int, float]] = {}
    for benchmark in benchmarks:
        for training in own:
            if evaluation := scored.get((training.name, benchmark)):
                by_seed.setdefault(benchmark, {})[training.seed] = evaluation.accuracy
    chances = [c for t in own for g in attention.last_groups(t.groups) if (c := _chance(g)) is not None]
    return Method(
        label=label,
        trainings=own,
        accuracy={name: s for name, seeds in by_seed.items() if (s := summarise(list(seeds.values())))},
        by_seed=by_seed,
        throughput=summarise([t.summary.get("samples_per_second") for t in own]),
        before=summarise([t.summary.get("crucial_hit_rate_start") for t in own]),
        after=summarise([t.summary.get("crucial_hit_rate_end") for t in own]),
        chance=fmean(chances) if chances else None,
    )


def _chance(group: attention.Group) -> float | None:
    """Probability that as many frames drawn blindly would hold a true key frame."""
    if not group.get("key_frames") or not group.get("crucial_frames") or not group.get("attention"):
        return None
    frames = len(group["attention"][0][0])
    keys, drawn = len(set(group["key_frames"])), len(group["crucial_frames"])
    return 1 - math.comb(frames - keys, drawn) / math.comb(frames, drawn)


def _differences(
    labels: Sequence[str],
    items: dict[str, dict[str, dict[int, dict[str, Item]]]],
    benchmarks: Sequence[str],
) -> tuple[PairedDifference, ...]:
    pairs = [pair for pair in _PAIRS if set(pair) <= set(labels)]
    pairs += [
        (label, "dapo") for label in labels if label not in ("grpo", "dapo", "appo") and "dapo" in labels
    ]
    found = []
    for benchmark in benchmarks:
        scores = {
            label: {seed: {i: item.score for i, item in table.items()} for seed, table in seeds.items()}
            for label, seeds in items.get(benchmark, {}).items()
        }
        for first, second in pairs:
            if first in scores and second in scores:
                difference = paired_difference(first, second, benchmark, scores[first], scores[second])
                if difference is not None:
                    found.append(difference)
    return tuple(found)


def _learned(analysis: Analysis, *, least: float = 0.10) -> str:
    """Whether the trainings learned, by held-out accuracy over the start."""
    benchmark = analysis.main_benchmark
    start = analysis.start.get(benchmark)
    gains = {
        m.name: m.accuracy[benchmark].mean - start
        for m in analysis.methods
        if start is not None and benchmark in m.accuracy
    }
    if not gains:
        return "Whether they learned cannot be said: the start was not evaluated."
    short = [name for name, gain in gains.items() if gain < least]
    if short:
        names = ", ".join(short)
        return (
            f"{names} gained less than {100 * least:.0f} points over the start: no learning is shown there."
        )
    lowest = int(100 * min(gains.values()))  # downwards: "at least" must hold
    return f"They learned: each gained at least {lowest} points of held-out accuracy over the start."


def limits(analysis: Analysis) -> list[str]:
    """What this comparison can and cannot show, as sentences made from its own size."""
    from appo.reports.statistics import SEEDS_FOR_CLAIM

    said = []
    if analysis.recipe.data.source == "key_moment":
        said.append(
            "The set is synthetic and the model tiny. What can be shown here: that videos are read, all algorithms "
            f"train, and everything is counted alike. {_learned(analysis)}"
        )
        said.append(
            "What cannot be shown here: that APPO is better than DAPO or GRPO. The completions share "
            "one short "
            "template, so right and wrong ones look at nearly the same frames and the token weights "
            "have little to "
            "tell apart. Differences between the algorithms on this set are no evidence for or "
            "against the method."
        )
    if analysis.seeds < SEEDS_FOR_CLAIM:
        least = 2.0 / 2**analysis.seeds
        said.append(
            f"{analysis.seeds} seed{'s' if analysis.seeds != 1 else ''} per algorithm: too few to "
            f"rank algorithms. "
            f"Even if every seed agreed, a test over seeds could not give p below {least:.3g}; the "
            f"paper reports "
            f"{SEEDS_FOR_CLAIM}."
        )
    counts = {
        len(table)
        for labels in analysis.items.values()
        for seeds in labels.values()
        for table in seeds.values()
    }
    if counts and min(counts) < 500:
        n = min(counts)
        said.append(
            f"{n} test questions: one score alone is uncertain by about "
            f"±{100 * 1.96 * math.sqrt(0.25 / n):.0f} points "
            "(95 %, around one half), before any luck of training."
        )
    timed = min(len(t.steps) for m in analysis.methods for t in m.trainings) - _UNTIMED_STEPS
    if timed < _STEPS_FOR_SPEED:
        said.append(
            f"{max(0, timed)} step{'s' if timed != 1 else ''} timed: samples per second and the ratio to DAPO are "
            f"noise; {_STEPS_FOR_SPEED} are needed."
        )
    said.append(
        "Samples per second were measured on the machine that trained; trainings that ran side by "
        "side shared it. "
        "The ratio to DAPO is the number to read, not the absolute one."
    )
    return said
