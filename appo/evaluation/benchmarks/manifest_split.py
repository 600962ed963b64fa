"""The test split of a run's own manifest as a benchmark: the demo's key-moment set, or anyone's records.

Its publisher is this package, so `official` is the reward that training used.
"""

from __future__ import annotations

from pathlib import Path

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import OFFICIAL, AnnotationError, Benchmark, answer_of
from appo.evaluation.predictions import Prediction
from appo.rewards.accuracy import MEASURES
from appo.rewards.answers import extract_choice, extract_number
from appo.rewards.temporal import extract_spans, set_overlap


class KeyMoment(Benchmark):
    """Items of any problem type, each measured by its own; grounding items also by set IoU."""

    name, title = "key_moment", "the manifest's own split"
    splits = ("test", "validation", "train")
    paper_parser = None

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        from appo.data.manifest import read_manifest

        manifest = read_manifest(folder)
        items = manifest.split(split)
        if not items:
            raise AnnotationError(f"{manifest.path}: has no {split} split; set data.{split}_share above 0")
        return cls(items, split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        accuracy = 0.0 if answer is None else MEASURES[sample.problem_type](answer, sample)
        values = {"accuracy": accuracy}
        if sample.problem_type == "temporal grounding":
            spans = extract_spans(prediction.response or "") or []
            values["tIoU"] = set_overlap(spans, sample.key_times, duration_s=sample.duration_s).iou
        else:
            values["tIoU"] = 0.0
        return _understood(sample, answer), {OFFICIAL: values}

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"type": sample.problem_type}

    def aggregate(self, scores: object) -> dict[str, dict[str, float]]:
        found = super().aggregate(scores)  # type: ignore[arg-type]
        # A mean over items that were asked for no time would say nothing.
        kept = {
            name: value
            for name, value in found.get(OFFICIAL, {}).items()
            if not name.endswith("tIoU") or "temporal grounding" in name
        }
        return {OFFICIAL: kept}


def _understood(sample: VideoSample, answer: str | None) -> str | None:
    if answer is None:
        return None
    if sample.options:
        return extract_choice(answer, sample.options)
    if sample.problem_type in ("numerical", "regression"):
        number = extract_number(answer)
        return None if number is None else f"{number:g}"
    return answer
