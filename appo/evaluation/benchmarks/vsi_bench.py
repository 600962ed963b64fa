"""VSI-Bench: spatial questions, by choice or by number; overall is the mean of eight tasks.

Publisher: vision-x-nyu/thinking-in-space (`lmms_eval/tasks/vsibench/utils.py`). Choices are the answer's first word;
numbers are scored by mean relative accuracy over ten thresholds. The variant `paper` reads letters and numbers
with the package's parser, with the same thresholds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import (
    OFFICIAL,
    PAPER,
    Benchmark,
    ItemScore,
    answer_of,
    grouped,
    lenient_choice,
    same_option,
)
from appo.evaluation.benchmarks.files import Record, find_file, read_lines, require_items, samples_from
from appo.evaluation.predictions import Prediction
from appo.rewards.answers import extract_number

FILES = ("test.jsonl", "test.json", "vsi_bench.jsonl", "vsi_bench.json")
CHOICE_TYPES = (
    "object_rel_direction_easy",
    "object_rel_direction_medium",
    "object_rel_direction_hard",
    "object_rel_distance",
    "route_planning",
    "obj_appearance_order",
)
NUMBER_TYPES = (
    "object_abs_distance",
    "object_counting",
    "object_size_estimation",
    "room_size_estimation",
)
# Three difficulties of one task.
DIRECTION = "object_rel_direction"
# 0.50, 0.55, ... 0.95, with the publisher's rounding: at the edges the last bit decides.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
_LETTERED = re.compile(r"^\s*\(?([A-Z])[.):]\s*")


class VSIBench(Benchmark):
    """Ids are the records' own."""

    name, title = "vsi_bench", "VSI-Bench"
    splits = ("test",)
    official_parser = "first word"
    paper_parser = "appo, first number"

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        path = find_file(folder, FILES, benchmark=cls.title)
        items = samples_from(read_lines(path), _sample, benchmark=cls.title)
        return cls(require_items(items, path, cls.title), split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        first = None if answer is None else answer.split(" ")[0].rstrip(".").strip()
        if sample.options:
            letter = lenient_choice(sample, answer)
            official = float(first is not None and first.lower() == sample.answer.lower())
            return letter or (first or None), {
                OFFICIAL: {"score": official},
                PAPER: {"score": same_option(sample, letter)},
            }
        truth = float(sample.answer)
        number = None if answer is None else extract_number(answer, where="first")
        values = {
            OFFICIAL: {"score": mean_relative_accuracy(_as_float(first), truth)},
            PAPER: {"score": mean_relative_accuracy(number, truth)},
        }
        return None if number is None else f"{number:g}", values

    def score_of(self, values: Mapping[str, Mapping[str, float]]) -> float:
        return values[OFFICIAL]["score"]

    def headline(self, variants: Mapping[str, Mapping[str, float]]) -> float:
        return variants[OFFICIAL]["overall"] if variants else 0.0

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"type": str(sample.extra["question_type"])}

    def aggregate(self, scores: Sequence[ItemScore]) -> dict[str, dict[str, float]]:
        """The mean of each task, and the mean of the tasks that are there."""
        found = {}
        for variant in (OFFICIAL, PAPER):
            by_type = {
                kind: fmean(score.values[variant]["score"] for score in members)
                for kind, members in grouped(scores, "type").items()
            }
            directions = [value for kind, value in by_type.items() if kind.startswith(DIRECTION)]
            tasks = {kind: value for kind, value in by_type.items() if not kind.startswith(DIRECTION)}
            if directions:
                tasks[DIRECTION] = fmean(directions)
            found[variant] = {"overall": fmean(tasks.values()), **by_type, **tasks}
        return found


def mean_relative_accuracy(predicted: float | None, truth: float) -> float:
    """Share of the ten thresholds t with |predicted - truth| / truth <= 1 - t; 0 for no number.

    The equality is the publisher's code's (its paper writes <): a relative error of 0.35 scores 0.4.
    """
    if predicted is None or not math.isfinite(predicted):
        return 0.0
    if truth == 0:
        return float(predicted == 0)
    relative = abs(predicted - truth) / truth
    return float(np.mean(relative <= 1 - THRESHOLDS)) if relative >= 0 else 0.0


def _as_float(word: str | None) -> float | None:
    """What the publisher makes of the first word: a float, or a miss."""
    if word is None or len(word) > 64:
        return None
    try:
        return float(word)
    except ValueError:  # prose where a number was asked
        return None


def _sample(record: Record) -> VideoSample:
    kind = str(record["question_type"])
    options = tuple(_LETTERED.sub("", str(option)) for option in record["options"] or ())
    answer = str(record["ground_truth"])
    if kind in CHOICE_TYPES and options:
        problem_type = "multiple choice"
    elif kind in NUMBER_TYPES and not options:
        problem_type = "regression"
        if not math.isfinite(float(answer)):
            raise ValueError(f"ground_truth={answer!r}: must be a number")
    else:
        raise ValueError(f"question_type={kind!r}: is unknown, or its options are not what this type has")
    return VideoSample(
        id=str(record["id"]),
        source="VSI-Bench",
        problem_type=problem_type,
        question=f"These are frames of a video.\n{record['question']}",
        answer=answer,
        options=options,
        video=f"{record['dataset']}/{record['scene_name']}.mp4",
        split="test",
        extra={"question_type": kind},
    )
