"""Samples -> the chosen ones: quotas by source, strata by type of question, splits by video; all by seed.

Every choice ranks by SHA-256 of (seed, what is ranked), never by position, so it depends on which samples
there are and on nothing else: not on the order of the file, the machine or the version of a random generator.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from appo.data.schema import VideoSample
from appo.errors import UserError


class QuotaError(UserError, ValueError):
    """A source has fewer samples than its quota; the message gives both and the remedy."""


def rank(seed: int, *what: str) -> str:
    """A reproducible random key: sort by it to shuffle, take the first n to draw n."""
    return hashlib.sha256("\x1f".join((str(seed), *what)).encode()).hexdigest()


def choose_subset(
    samples: Sequence[VideoSample],
    *,
    quota: Mapping[str, int | Literal["all"]],
    seed: int,
    take_all_if_short: bool = False,
) -> list[VideoSample]:
    """`quota[source]` samples of each source (a number or "all"), its types of question in proportion to how
    often they occur.

    Without quotas everything is taken; with quotas, sources that have none give nothing. Raises QuotaError
    when a source is short, unless `take_all_if_short`.
    """
    if quota:
        by_source: dict[str, list[VideoSample]] = defaultdict(list)
        for sample in samples:
            by_source[sample.source].append(sample)
        wanted = {s: max(1, len(by_source[s])) if n == "all" else n for s, n in quota.items()}
        short = {s: n for s, n in wanted.items() if len(by_source[s]) < n}
        if short and not take_all_if_short:
            details = "; ".join(f"{s} has {len(by_source[s]):,} of {n:,}" for s, n in sorted(short.items()))
            raise QuotaError(
                f"data.quotas: too few samples: {details}. Lower the quotas, check data.annotations, or set "
                f"data.quota_shortfall: take_all"
            )
        samples = [s for name, n in sorted(wanted.items()) for s in _stratified(by_source[name], n, seed)]
    return sorted(samples, key=lambda sample: rank(seed, sample.id))


def _stratified(samples: Sequence[VideoSample], count: int, seed: int) -> list[VideoSample]:
    strata: dict[str, list[VideoSample]] = defaultdict(list)
    for sample in samples:
        strata[sample.problem_type].append(sample)
    shares = apportion({name: len(members) for name, members in strata.items()}, min(count, len(samples)))
    chosen: list[VideoSample] = []
    for name, share in shares.items():
        chosen += sorted(strata[name], key=lambda sample: rank(seed, sample.id))[:share]
    return chosen


def apportion(sizes: Mapping[str, int], seats: int) -> dict[str, int]:
    """`seats` shared out in proportion to `sizes` by largest remainder; ties go to the first name. Sums to
    `seats`.
    """
    total = sum(sizes.values())
    if not total:
        return {}
    shares = {name: seats * size // total for name, size in sorted(sizes.items())}
    remainders = sorted(sizes, key=lambda name: (-(seats * sizes[name] % total), name))
    for name in remainders[: seats - sum(shares.values())]:
        shares[name] += 1
    return shares


def assign_splits(
    samples: Sequence[VideoSample], *, validation_share: float, test_share: float, seed: int
) -> list[VideoSample]:
    """Move whole videos from train to test and validation until each has about its share of the samples.

    Questions about one video stay together: a model must not meet a test video in training. Samples that
    their source put into a split stay there. A share above 0 gets at least one video, when train keeps one.
    """
    movable = [s for s in samples if s.split == "train"]
    groups: dict[str, list[str]] = defaultdict(list)
    for sample in movable:
        groups[sample.video or sample.image or sample.id].append(sample.id)
    order = sorted(groups, key=lambda video: rank(seed, "split", video))
    moved: dict[str, str] = {}
    for split, share in (("test", test_share), ("validation", validation_share)):
        wanted, taken = share * len(movable), 0
        while wanted and len(order) > 1:
            size = len(groups[order[0]])
            if taken and wanted - taken < size / 2:  # one more would miss the share by more
                break
            taken += size
            moved.update(dict.fromkeys(groups[order.pop(0)], split))
    return [replace(s, split=moved[s.id]) if s.id in moved else s for s in samples]


def counts_of(samples: Iterable[VideoSample]) -> dict[str, dict[str, int]]:
    """Samples by split, by source, by type of question and by both."""
    tables: dict[str, Counter[str]] = {
        name: Counter() for name in ("split", "source", "problem_type", "stratum")
    }
    for sample in samples:
        tables["split"][sample.split] += 1
        tables["source"][sample.source] += 1
        tables["problem_type"][sample.problem_type] += 1
        tables["stratum"][f"{sample.source} / {sample.problem_type}"] += 1
    return {name: dict(sorted(table.items())) for name, table in tables.items()}
