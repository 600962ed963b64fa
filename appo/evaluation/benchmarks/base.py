"""What every benchmark is: items from its publisher's records, a score for each response, an average over
them.

One file each beside this one. Each has variants: `official` is its publisher's scorer fed with the text
inside `<answer>`, `paper` what APPO's paper does where that differs. Whatever the publisher's script does
with them, items without a readable answer count as wrong here, in every denominator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import ClassVar

from appo.data.schema import VideoSample
from appo.errors import UserError
from appo.evaluation.predictions import Prediction
from appo.rewards.answers import extract_answer, extract_choice

OFFICIAL, PAPER = "official", "paper"


class BenchmarkError(UserError, ValueError):
    """A benchmark, split or option that does not exist."""


class AnnotationError(BenchmarkError):
    """Annotations that are not this benchmark's, or are broken: file, line, reason."""


@dataclass(frozen=True, slots=True)
class ItemScore:
    """One item: score is the headline in [0, 1]; values are its measures by variant; groups what it counts
    into.

    status: "ok", or why the answer counts as wrong: "missing", "truncated" or "unparsed".
    """

    id: str
    score: float
    answer: str
    parsed: str | None
    status: str
    groups: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Benchmark(ABC):
    """A named set of items with its publisher's rules. Instances are made by `load`."""

    name: ClassVar[str]
    title: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ("test",)
    template: ClassVar[str] = "reasoning"
    # What reads its answers in each variant: scores of different parsers are not comparable.
    official_parser: ClassVar[str] = "appo"
    paper_parser: ClassVar[str | None] = "appo"

    def __init__(self, items: Sequence[VideoSample], split: str):
        self.items, self.split = tuple(items), split

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        """Read the publisher's annotations in `folder`. Raises AnnotationError with file, line and reason."""

    def find_videos(self, folder: Path) -> None:  # noqa: B027 - most were released in one form only
        """Settle which files below `folder` the items mean, for a benchmark that was released in several forms."""

    @abstractmethod
    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        """(what was understood or None, variant -> measure -> value in [0, 1]) of a response that is not
        truncated. What the parser cannot read must have value 0 in every measure."""

    def score_of(self, values: Mapping[str, Mapping[str, float]]) -> float:
        """The item's headline score."""
        return values[OFFICIAL]["accuracy"]

    def headline(self, variants: Mapping[str, Mapping[str, float]]) -> float:
        """The one number that comparisons rank by; 0 without items."""
        return variants[OFFICIAL]["accuracy"] if variants else 0.0

    def parsers(self) -> dict[str, str]:
        """Variant -> the parser behind it."""
        return {OFFICIAL: self.official_parser} | ({PAPER: self.paper_parser} if self.paper_parser else {})

    def groups(self, sample: VideoSample) -> dict[str, str]:
        """What the item counts into, by kind of group."""
        return {}

    def aggregate(self, scores: Sequence[ItemScore]) -> dict[str, dict[str, float]]:
        """Variant -> metric -> value, over all items. The plain rule: means, overall and by group."""
        return {variant: self.means(scores, variant) for variant in scores[0].values} if scores else {}

    def means(self, scores: Sequence[ItemScore], variant: str) -> dict[str, float]:
        """Mean of every measure over all items, then `{kind}/{group}/{measure}` for each group."""
        found: dict[str, float] = {}
        for measure in scores[0].values[variant]:
            found[measure] = fmean(score.values[variant][measure] for score in scores)
        for kind in scores[0].groups:
            for group, members in grouped(scores, kind).items():
                for measure in scores[0].values[variant]:
                    name = f"{kind}/{group}/{measure}"
                    found[name] = fmean(score.values[variant][measure] for score in members)
        return found

    def score(self, sample: VideoSample, prediction: Prediction | None) -> ItemScore:
        """One item's score; nothing, and a response cut off at its token limit, are wrong."""
        if prediction is None or prediction.missing:
            status = "missing"
        elif prediction.truncated:
            status = "truncated"
        else:
            status = "ok"
        if status == "ok":
            assert prediction is not None
            parsed, values = self.measure(sample, prediction)
            status = "ok" if parsed is not None else "unparsed"
        else:
            parsed = None
            _, values = self.measure(sample, Prediction(sample.id, ""))
        return ItemScore(
            sample.id, self.score_of(values), sample.answer, parsed, status, self.groups(sample), values
        )


def grouped(scores: Sequence[ItemScore], kind: str) -> dict[str, list[ItemScore]]:
    """The items of each group of a kind, groups by name."""
    found: dict[str, list[ItemScore]] = {}
    for score in scores:
        found.setdefault(score.groups[kind], []).append(score)
    return dict(sorted(found.items()))


def answer_of(prediction: Prediction) -> str | None:
    """The text inside `<answer>`, or the answer that a file in the span format gives outright."""
    if prediction.answer is not None:
        return prediction.answer.strip() or None
    return None if prediction.response is None else extract_answer(prediction.response)


def lenient_choice(sample: VideoSample, answer: str | None) -> str | None:
    """The letter that the package's own parser reads (the one that training is rewarded by)."""
    return None if answer is None else extract_choice(answer, sample.options)


def same_option(sample: VideoSample, letter: str | None) -> float:
    """1 for the right option; a few records give it twice, then either letter is right."""
    if letter is None or not 0 <= ord(letter) - ord("A") < len(sample.options):
        return 0.0
    return float(sample.options[ord(letter) - ord("A")] == sample.options[ord(sample.answer) - ord("A")])
