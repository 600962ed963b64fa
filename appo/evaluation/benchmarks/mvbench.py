"""MVBench: twenty tasks, reported apart; overall is the mean of the tasks.

The official parser is lmms-eval's `mcq_acc`: a leading `X.`, else the first standalone A to E of the lower-cased,
unpunctuated text, so that the article "a" is option A. There empty answers leave the denominator; here they do
not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from appo.data.media import MediaMissing, MediaRoot
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
from appo.evaluation.benchmarks.files import Record, letter_of, read_lines, require_items, samples_from
from appo.evaluation.predictions import Prediction

# Task -> the folder of its videos in the release that lmms-eval uses (clips cut to their segments).
TASKS = {
    "action_antonym": "ssv2_video",
    "action_count": "perception/videos",
    "action_localization": "sta/sta_video_segment",
    "action_prediction": "star/Charades_segment",
    "action_sequence": "star/Charades_segment",
    "character_order": "perception/videos",
    "counterfactual_inference": "clevrer/video_validation",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/video_fps3_hq_segment",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "fine_grained_pose": "nturgbd_convert",
    "moving_attribute": "clevrer/video_validation",
    "moving_count": "clevrer/video_validation",
    "moving_direction": "clevrer/video_validation",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_segment",
    "object_shuffle": "perception/videos",
    "scene_transition": "scene_qa/video",
    "state_change": "perception/videos",
    "unexpected_action": "FunQA_test/test",
}
# Where the first release has the same videos: whole ones, to be cut at the record's `start` and `end`, or only under
# another folder's name.
_UNCUT = {
    "star/Charades_segment": "star/Charades_v1_480",
    "sta/sta_video_segment": "sta/sta_video",
    "tvqa/video_fps3_hq_segment": "tvqa/frames_fps3_hq",
}
_ELSEWHERE = {"nturgbd_convert": "nturgbd", "ssv2_video": "ssv2_video_mp4"}
FRAME_RATE = 3.0  # of the folders of frames in tvqa/frames_fps3_hq
_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
_LEADING = re.compile(r"([A-E])\.\s*\S.*", re.IGNORECASE | re.ASCII)
_THOUSANDS = re.compile(r"[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_STANDALONE = re.compile(r"\b([a-e])\b")


class MVBench(Benchmark):
    """Ids are `{task}_{index}`, the index counted from 0 in the task's file."""

    name, title = "mvbench", "MVBench"
    splits = ("test",)
    official_parser = "lmms-eval mcq_acc"

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        place = folder / "json" if (folder / "json").is_dir() else folder
        items: list[VideoSample] = []
        missing = [task for task in TASKS if not (place / f"{task}.json").is_file()]
        if missing:
            raise AnnotationError(
                f"{place}: lacks {missing[0]}.json ({len(missing)} of {len(TASKS)} tasks); the overall score is "
                "the mean of all of them"
            )
        for task in TASKS:
            rows = read_lines(place / f"{task}.json")
            numbered = ((where, (task, index, record)) for index, (where, record) in enumerate(rows))
            items += require_items(samples_from(numbered, _sample, benchmark=cls.title), place, task)
        return cls(items, split)

    def find_videos(self, folder: Path) -> None:
        """Clips as lmms-eval ships them where they are there, else the first release's whole videos, cut here; in
        both the model sees the same part."""
        root = MediaRoot(folder)
        self.items = tuple(_located(sample, root) for sample in self.items)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        official = None if answer is None else read_letter(answer)
        values = {
            OFFICIAL: {"accuracy": float(official == sample.answer)},
            PAPER: {"accuracy": same_option(sample, lenient_choice(sample, answer))},
        }
        return official or lenient_choice(sample, answer), values

    def groups(self, sample: VideoSample) -> dict[str, str]:
        return {"task": str(sample.extra["task"])}

    def aggregate(self, scores: Sequence[ItemScore]) -> dict[str, dict[str, float]]:
        found = super().aggregate(scores)
        for means in found.values():
            means["accuracy"] = fmean(value for name, value in means.items() if name.startswith("task/"))
        return found


def read_letter(answer: str) -> str | None:
    """The option that lmms-eval's `mcq_acc` understands, upper case, or None."""
    text = answer.strip()
    if leading := _LEADING.fullmatch(text):
        return leading[1].upper()
    text = text.replace("\n", " ").replace("\t", " ")
    cleaned, joined = text, _THOUSANDS.search(text) is not None
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or joined else " ")
    found = _STANDALONE.search(_PERIOD.sub("", cleaned).lower())
    return found[1].upper() if found else None


def _located(sample: VideoSample, root: MediaRoot) -> VideoSample:
    assert sample.video is not None
    folder = TASKS[str(sample.extra["task"])]
    name = sample.video.removeprefix(f"{folder}/")
    alike = [
        name,
        f"{name}.mp4",
    ]  # the first release names episodic_reasoning's folders, which have no suffix
    for place in (folder, _ELSEWHERE.get(folder, folder)):
        for video in (f"{place}/{one}" for one in alike):
            if _is_there(root, video):
                return replace(sample, video=video)
    uncut = _UNCUT.get(folder)
    frames = uncut is not None and uncut.startswith("tvqa/")
    video = f"{uncut}/{name.removesuffix('.mp4') if frames else name}"
    if uncut is None or not _is_there(root, video):
        return sample  # evaluation says that it is missing
    extra = dict(sample.extra)
    if frames:
        extra["frame_rate"] = FRAME_RATE
    if "start" in extra and "end" in extra:
        extra["clip"] = [float(extra["start"]), float(extra["end"])]
    else:
        raise AnnotationError(
            f"{video}: is a whole video, and record {sample.id} has no start and end to cut it at"
        )
    return replace(sample, video=video, extra=extra)


def _is_there(root: MediaRoot, video: str) -> bool:
    try:
        root.find(video)
    except MediaMissing:
        return False
    return True


def _sample(numbered: tuple[str, int, Record]) -> VideoSample:
    task, index, record = numbered
    options = tuple(str(option) for option in record["candidates"])
    if record["answer"] not in record["candidates"]:
        raise ValueError(f"answer={record['answer']!r}: is not one of the candidates")
    return VideoSample(
        id=f"{task}_{index}",
        source="MVBench",
        problem_type="multiple choice",
        question=str(record["question"]),
        answer=letter_of(record["candidates"].index(record["answer"]), options),
        options=options,
        video=f"{TASKS[task]}/{record['video']}",
        split="test",
        extra={"task": task, **{key: record[key] for key in ("start", "end") if key in record}},
    )
