"""Perception Test, multiple choice, validation split (the test split's answers are not public).

Reads the publisher's raw file (a dictionary by video id) or rows of lmms-eval's `mc_question_val`. The official
parser is lmms-eval's: the first standalone A to D, so that the article in `A person` is option A.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import (
    OFFICIAL,
    PAPER,
    AnnotationError,
    Benchmark,
    answer_of,
    lenient_choice,
    same_option,
)
from appo.evaluation.benchmarks.files import (
    Record,
    find_file,
    letter_of,
    read_json,
    read_lines,
    require_items,
    samples_from,
)
from appo.evaluation.predictions import Prediction

FILES = (
    "mc_question_valid.json",
    "mc_question_val.json",
    "mc_question_val.jsonl",
    "all_valid.json",
)
_LETTER = re.compile(r"\b([A-D])\b")


class PerceptionTest(Benchmark):
    """Ids are `{video}_{question id}`."""

    name, title = "perception_test", "Perception Test"
    splits = ("val",)
    official_parser = "lmms-eval perceptiontest: first standalone A-D"

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        path = find_file(folder, FILES, benchmark=cls.title)
        rows = _rows(path) if path.suffix == ".json" else read_lines(path)
        items = samples_from(rows, _sample, benchmark=cls.title)
        return cls(require_items(items, path, cls.title), split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        found = None if answer is None else _LETTER.search(answer)
        official = found[1] if found else None
        values = {
            OFFICIAL: {"accuracy": float(official == sample.answer)},
            PAPER: {"accuracy": same_option(sample, lenient_choice(sample, answer))},
        }
        return official or lenient_choice(sample, answer), values

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"area": str(sample.extra["area"]), "reasoning": str(sample.extra["reasoning"])}


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    raw = read_json(path)
    if isinstance(raw, list):
        yield from read_lines(path)
        return
    if not isinstance(raw, dict):
        raise AnnotationError(f"{path}: is a JSON {type(raw).__name__}, not a dictionary by video id")
    for video, about in raw.items():
        if not isinstance(about, dict) or not isinstance(about.get("mc_question"), list):
            raise AnnotationError(
                f"{path}, video {video!r}: mc_question: is missing; is this Perception Test?"
            )
        for question in about["mc_question"]:
            if not isinstance(question, dict):
                raise AnnotationError(f"{path}, video {video!r}: a question is {type(question).__name__}")
            yield f"{path}, video {video!r}", {**question, "video_name": video}


def _sample(record: Record) -> VideoSample:
    options = tuple(str(option) for option in record["options"])
    question_id = record["question_id"] if "question_id" in record else record["id"]
    return VideoSample(
        id=f"{record['video_name']}_{question_id}",
        source="Perception Test",
        problem_type="multiple choice",
        question=str(record["question"]),
        answer=letter_of(int(record["answer_id"]), options),
        options=options,
        video=f"videos/{record['video_name']}.mp4",
        split="test",
        extra={"area": record.get("area", ""), "reasoning": record.get("reasoning", "")},
    )
