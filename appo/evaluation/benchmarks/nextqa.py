"""NExT-QA, multiple choice: causal, temporal and descriptive questions about everyday videos.

The official parser is MMMU's, as lmms-eval uses it (`tasks/nextqa/utils.py`): `(A)`, else `A ` anywhere, else
`A.`, else an option's text in a longer answer; the last occurrence wins. Where it finds nothing it draws an
option at random; here that is a wrong answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from appo.data.schema import VideoSample
from appo.evaluation.benchmarks.base import (
    OFFICIAL,
    PAPER,
    Benchmark,
    answer_of,
    lenient_choice,
    same_option,
)
from appo.evaluation.benchmarks.files import (
    find_file,
    letter_of,
    read_csv,
    read_json,
    require_items,
    samples_from,
)
from appo.evaluation.predictions import Prediction

TYPES = ("CH", "CW", "TN", "TC", "TP", "DB", "DC", "DL", "DO")
_SHORTEST_PROSE = 5  # words; a shorter answer is not searched for an option's text


class NExTQA(Benchmark):
    """Ids are `{video}_{qid}`. Groups: C, T, D, and the types with TP counted as TN."""

    name, title = "nextqa", "NExT-QA"
    splits = ("test", "val")
    official_parser = "lmms-eval nextqa (MMMU), without its random guess"

    @classmethod
    def load(cls, folder: Path, split: str) -> Benchmark:
        path = find_file(folder, [f"{split}.csv"], benchmark=cls.title)
        map_path = path.with_name("map_vid_vidorID.json")
        places = read_json(map_path) if map_path.is_file() else {}

        def to_sample(row: dict[str, str]) -> VideoSample:
            return _sample(row, places)

        items = samples_from(read_csv(path), to_sample, benchmark=cls.title)
        return cls(require_items(items, path, cls.title), split)

    def measure(
        self, sample: VideoSample, prediction: Prediction
    ) -> tuple[str | None, dict[str, dict[str, float]]]:
        answer = answer_of(prediction)
        official = None if answer is None else read_letter(answer, sample.options)
        letter = lenient_choice(sample, answer)
        values = {
            OFFICIAL: {"accuracy": same_option(sample, official)},
            PAPER: {"accuracy": same_option(sample, letter)},
        }
        return official or letter, values

    def groups(self, sample: VideoSample) -> dict[str, str]:
        kind = str(sample.extra["question_type"])
        return {"group": kind[0], "type": "TN" if kind == "TP" else kind}


def read_letter(answer: str, options: Sequence[str]) -> str | None:
    """The option that MMMU's parser understands, or None where it would guess."""
    text = answer
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    letters = [chr(ord("A") + index) for index in range(len(options))]
    for written, searched in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if written.format(letter) in text]
        if found:
            return _last(found, {letter: text.rfind(searched.format(letter)) for letter in found})
    if len(text.split()) <= _SHORTEST_PROSE:
        return None
    lower = text.lower()
    places = {
        letter: lower.rfind(option.lower()) for letter, option in zip(letters, options, strict=True) if option
    }
    found = [letter for letter in places if places[letter] >= 0]
    return _last(found, places) if found else None


def _last(found: Sequence[str], places: Mapping[str, int]) -> str:
    """The candidate whose last occurrence comes last; of equals the first, as numpy's argmax."""
    return found[0] if len(found) == 1 else max(found, key=lambda letter: places[letter])


def _sample(row: Mapping[str, str], places: Mapping[str, str]) -> VideoSample:
    options = tuple(row[f"a{index}"] for index in range(5))
    video = row["video_id"] if "video_id" in row else row["video"]
    if row["type"] not in TYPES:
        raise ValueError(f"type={row['type']!r}: must be one of {', '.join(TYPES)}")
    if not row["answer"].isdecimal():
        raise ValueError(
            f"answer={row['answer']!r}: must be an index; NExT-GQA's file gives the option's text"
        )
    return VideoSample(
        id=f"{video}_{row['qid']}",
        source="NExT-QA",
        problem_type="multiple choice",
        question=row["question"],
        answer=letter_of(int(row["answer"]), options),
        options=options,
        video=f"{places.get(video, video)}.mp4",
        split="test",
        extra={"question_type": row["type"]},
    )
