"""Scores by seed and by question -> means, deviations, and what may be said about a difference.

Pure numbers: no file, no model. The spread over seeds says how far a training's result depends on luck; the
spread over questions how far a score depends on which questions were asked. A claim needs both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

# The paper's own number of seeds (supplement, Table E). With n seeds, no sign-flip test over them can fall
# below 2 / 2**n: .5 for two, .0625 for five.
SEEDS_FOR_CLAIM = 5
CONFIDENCE = 0.95
_REPLICATES_AT_ONCE = 500


@dataclass(frozen=True, slots=True)
class SeedSummary:
    """std: with n-1; None for a single seed, whose deviation is unknown, not zero."""

    mean: float
    std: float | None
    n: int


def summarise(values: Sequence[float | None]) -> SeedSummary | None:
    """Mean and deviation over seeds; missing values are left out and lower n. None when nothing is left."""
    kept = [float(v) for v in values if v is not None and math.isfinite(v)]
    if not kept:
        return None
    return SeedSummary(fmean(kept), stdev(kept) if len(kept) > 1 else None, len(kept))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """How much `first` scores above `second` on the same questions, with the same seeds.

    low, high: 95 % bootstrap interval, questions resampled, and seeds too where there are several.
    p_items: sign-flip permutation test over questions, for these very checkpoints. p_seeds: exact sign-flip
    test over seeds; p_seeds_least is the smallest value it could have taken with so many seeds. fixed,
    broken: mean number of questions per seed that only `first`, only `second` answers right.
    """

    first: str
    second: str
    benchmark: str
    mean: float
    low: float
    high: float
    p_items: float
    p_seeds: float
    seeds: int
    items: int
    fixed: float
    broken: float

    @property
    def p_seeds_least(self) -> float:
        return 2.0 / 2**self.seeds

    @property
    def verdict(self) -> str:
        """What the numbers allow to be said, in words."""
        if self.seeds < SEEDS_FOR_CLAIM:
            return f"no claim: {self.seeds} seed{'s' if self.seeds > 1 else ''}, {SEEDS_FOR_CLAIM} are needed"
        if self.low <= 0.0 <= self.high or self.p_items > 1 - CONFIDENCE:
            return "no difference shown"
        return "higher" if self.mean > 0 else "lower"


def paired_difference(
    first: str,
    second: str,
    benchmark: str,
    scores_first: Mapping[int, Mapping[str, float]],
    scores_second: Mapping[int, Mapping[str, float]],
    *,
    replicates: int = 10_000,
    seed: int = 0,
) -> PairedDifference | None:
    """Compare two methods over the seeds and questions that both have.

    scores_*: seed -> question id -> score. None when they share no seed or no question.
    """
    seeds = sorted(set(scores_first) & set(scores_second))
    tables = [scores[s] for scores in (scores_first, scores_second) for s in seeds]
    items = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    if not items:
        return None
    a = np.array([[scores_first[s][i] for i in items] for s in seeds])
    b = np.array([[scores_second[s][i] for i in items] for s in seeds])
    differences = a - b
    rng = np.random.default_rng(seed)
    low, high = bootstrap_interval(differences, replicates=replicates, rng=rng)
    return PairedDifference(
        first=first,
        second=second,
        benchmark=benchmark,
        mean=float(differences.mean()),
        low=low,
        high=high,
        p_items=sign_flip_p(differences.mean(axis=0), replicates=replicates, rng=rng),
        p_seeds=exact_sign_flip_p(differences.mean(axis=1)),
        seeds=len(seeds),
        items=len(items),
        fixed=float(((a >= 0.5) & (b < 0.5)).sum() / len(seeds)),
        broken=float(((a < 0.5) & (b >= 0.5)).sum() / len(seeds)),
    )


def bootstrap_interval(
    differences: np.ndarray, *, replicates: int, rng: np.random.Generator
) -> tuple[float, float]:
    """95 % percentile interval of the mean of (seeds, items) differences, both axes resampled.

    With one seed only questions are resampled: the interval then speaks of that checkpoint alone.
    """
    num_seeds, num_items = differences.shape
    means: list[np.ndarray] = []
    for start in range(0, replicates, _REPLICATES_AT_ONCE):
        count = min(_REPLICATES_AT_ONCE, replicates - start)
        by_seed = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count) / num_seeds
        by_item = rng.multinomial(num_items, np.full(num_items, 1 / num_items), size=count) / num_items
        means.append(((by_seed @ differences) * by_item).sum(axis=1))
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return float(low), float(high)


def sign_flip_p(differences: np.ndarray, *, replicates: int, rng: np.random.Generator) -> float:
    """Two-sided p of the mean of paired differences, when the two methods are exchangeable on each question.

    Random flips; the observed one is counted among them, so p is never 0.
    """
    observed = abs(float(differences.sum()))
    moving = differences[differences != 0.0]
    if moving.size == 0:
        return 1.0
    as_large = 1
    for start in range(0, replicates, _REPLICATES_AT_ONCE):
        count = min(_REPLICATES_AT_ONCE, replicates - start)
        signs = rng.integers(0, 2, size=(count, moving.size)) * 2 - 1
        # 1e-9: sums of equal terms in another order differ by rounding and must count as equal
        as_large += int((np.abs(signs @ moving) >= observed - 1e-9).sum())
    return as_large / (replicates + 1)


def exact_sign_flip_p(differences: np.ndarray) -> float:
    """Two-sided p over all 2**n sign patterns; for seeds, of which there are few. n above 16 is cut to 16."""
    values = np.asarray(differences, dtype=float)[:16]
    observed = abs(float(values.sum()))
    patterns = itertools.product((-1.0, 1.0), repeat=len(values))
    as_large = sum(abs(float(np.dot(signs, values))) >= observed - 1e-9 for signs in patterns)
    return as_large / 2 ** len(values)


@dataclass(frozen=True, slots=True)
class Band:
    """A learning curve over seeds. std: nan where fewer than two seeds reached the step."""

    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    n: int


def band(curves: Sequence[Sequence[tuple[int, float]]], *, window: int = 1) -> Band | None:
    """Curves of (step, value), one a seed -> mean and deviation at each step that any of them has.

    window: running mean over so many steps of each curve first (trailing; shorter at the start).
    """
    smoothed: list[dict[int, float]] = []
    for curve in curves:
        points = [(step, value) for step, value in curve if value is not None and math.isfinite(value)]
        values = [value for _, value in points]
        means = [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
        if points:
            smoothed.append({step: mean for (step, _), mean in zip(points, means, strict=True)})
    if not smoothed:
        return None
    steps = sorted(set().union(*smoothed))
    columns = [[curve[step] for curve in smoothed if step in curve] for step in steps]
    return Band(
        steps=np.array(steps),
        mean=np.array([fmean(column) for column in columns]),
        std=np.array([stdev(column) if len(column) > 1 else math.nan for column in columns]),
        n=len(smoothed),
    )
