"""NExT-GQA: a choice among five and the seconds that show why; accuracy, grounding, and both at once.

Publisher: doc-doc/NExT-GQA (`code/TempGQA/eval_ground.py`): one predicted span, against each true span on its own;
the best IoU and the best IoP count, apart. Its script leaves out questions without a prediction and gives a span
of zero length IoP 1; the former count as wrong here, the latter stays. The variant `paper` is APPO's: one or more
intervals, strictly intersection over union of the two unions, within the video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import (
    OFFICIAL,
    PAPER,
    AnnotationError,
    Benchmark,
    ItemScore,
    answer_of,
    lenient_choice,
    same_option,
)
from appo.evaluation.benchmarks.files import find_file, letter_of, read_csv, read_json, samples_from
from appo.evaluation.predictions import Prediction
from appo.rewards.temporal import Span, SpanScores, extract_spans, set_overlap, span_scores

SpanRule = Literal["hull", "best"]
THRESHOLDS = (0.3, 0.5)


class NExTGQA(Benchmark):
    """Ids are `{video_id}_{qid}`. span_rule: how several predicted intervals become the one span of the official
    script: their hull, or the one that matches best (which looks at the truth: an upper bound).
    """

    name, title, template = "nextgqa", "NExT-GQA", "grounding"
    splits = ("test", "val")

    def __init__(self, items: Sequence[VideoSample], split: str, span_rule: SpanRule = "hull"):
        super().__init__(items, split)
        self.span_rule = span_rule

    def parsers(self) -> dict[str, str]:
        return {
            OFFICIAL: f"appo; several intervals: {self.span_rule}",
            PAPER: "appo; union of intervals",
        }

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        path = find_file(folder, [f"{split}.csv"], benchmark=cls.title)
        part = split if folder.is_dir() else path.stem
        spans_path = path.with_name(f"gsub_{part}.json")
        if not spans_path.is_file():
            raise AnnotationError(
                f"{spans_path}: is missing; NExT-GQA's times stand there (NExT-QA has none)"
            )
        spans = read_json(spans_path)
        if not isinstance(spans, dict):
            raise AnnotationError(
                f"{spans_path}: is a JSON {type(spans).__name__}, not a dictionary by video id"
            )
        map_path = path.with_name("map_vid_vidorID.json")
        places = read_json(map_path) if map_path.is_file() else {}

        def to_sample(row: dict[str, str]) -> VideoSample:
            return _sample(row, spans, places)

        items = samples_from(read_csv(path), to_sample, benchmark=cls.title)
        if not items:
            raise AnnotationError(f"{path}: holds no question")
        return cls(items, split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        letter = lenient_choice(sample, answer)
        if letter is None and prediction.answer is not None and prediction.answer.strip().isdecimal():
            # Other systems' files give the option's index.
            index = int(prediction.answer)
            letter = chr(ord("A") + index) if index < len(sample.options) else None
        right = same_option(sample, letter)
        spans = prediction.spans
        if spans is None:
            spans = tuple(extract_spans(prediction.response or "") or ())
        true = [(float(start), float(end)) for start, end in sample.extra["spans"]]
        values = {
            OFFICIAL: _values(right, self._official(spans, true), bool(spans)),
            PAPER: _values(right, set_overlap(spans, true, duration_s=sample.duration_s), bool(spans)),
        }
        return letter, values

    def _official(self, spans: Sequence[Span], true: Sequence[Span]) -> SpanScores:
        spans = [(start, end) for start, end in spans if start <= end]
        if not spans:
            return SpanScores(0.0, 0.0)
        if self.span_rule == "hull":
            return span_scores((min(start for start, _ in spans), max(end for _, end in spans)), true)
        return max((span_scores(span, true) for span in spans), key=lambda found: (found.iou, found.iop))

    def score_of(self, values: Mapping[str, Mapping[str, float]]) -> float:
        return values[OFFICIAL]["Acc@QA"]

    def headline(self, variants: Mapping[str, Mapping[str, float]]) -> float:
        return variants[OFFICIAL]["Acc@QA"] if variants else 0.0

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"type": str(sample.extra["question_type"])}

    def aggregate(self, scores: Sequence[ItemScore]) -> dict[str, dict[str, float]]:
        """The measures' means over all questions; by question type only the four that the publisher tabulates."""
        found = {}
        for variant in (OFFICIAL, PAPER):
            means = self.means(scores, variant)
            kept = ("Acc@QA", "Acc@GQA", "mIoU", "mIoP")
            found[variant] = {
                name: value
                for name, value in means.items()
                if not name.startswith("type/") or name.rpartition("/")[2] in kept
            }
        return found


def _values(right: float, overlap: SpanScores, given: bool) -> dict[str, float]:
    values = {
        "Acc@QA": right,
        "Acc@GQA": right * float(overlap.iop >= 0.5),
        "mIoP": overlap.iop,
        "mIoU": overlap.iou,
    }
    for threshold in THRESHOLDS:
        values[f"IoP@{threshold}"] = float(overlap.iop >= threshold)
        values[f"IoU@{threshold}"] = float(overlap.iou >= threshold)
    values["time_given"] = float(given)
    return values


def _sample(row: Mapping[str, str], spans: Mapping[str, Any], places: Mapping[str, str]) -> VideoSample:
    video_id, qid = row["video_id"], row["qid"]
    options = tuple(row[f"a{index}"] for index in range(5))
    if row["answer"] not in options:
        hint = "NExT-QA's own file gives an index" if row["answer"].isdecimal() else "it is none of a0 to a4"
        raise ValueError(f"answer={row['answer']!r}: must be the text of an option; {hint}")
    about = spans.get(video_id)
    if about is None or qid not in about["location"]:
        raise ValueError(f"question {video_id}_{qid}: has no times in gsub_*.json")
    true = [(float(start), float(end)) for start, end in about["location"][qid]]
    duration = float(about["duration"])
    # A few published spans end after their video; the official script takes them as they are.
    inside = tuple(sorted((s, min(e, duration)) for s, e in true if 0 <= s < min(e, duration)))
    return VideoSample(
        id=f"{video_id}_{qid}",
        source="NExT-GQA",
        problem_type="temporal grounding",
        question=row["question"],
        answer=letter_of(options.index(row["answer"]), options),
        options=options,
        video=f"{places.get(video_id, video_id)}.mp4",
        split="test",
        duration_s=duration,
        key_times=inside,
        extra={"question_type": row["type"], "spans": [list(span) for span in true]},
    )
