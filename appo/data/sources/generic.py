"""Your own videos and questions, one JSON object a line -> samples.

The fields are those of `VideoSample` with every publisher's quirk left out: `question`, `video` (path below
data.root) and `answer` are needed, `options`, `id`, `problem_type`, `image`, `split`, `duration_s`,
`key_times` may be given. The answer of a question with options is a letter or the text of one option. See
docs/data.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.data.sources.base import SourceData, annotations_of, number_or_none, read_records, root_of, times

FIELDS = {
    "id", "source", "question", "video", "image", "answer", "options", "problem_type", "split", "duration_s",
    "key_times", "extra",
}  # fmt: skip


def read(recipe: Recipe, folder: Path) -> SourceData:
    files: dict[str, str] = {}
    rows = read_records(annotations_of(recipe), to_sample, id_field="id", files=files)
    return SourceData(rows, root_of(recipe), files)


def to_sample(record: Mapping[str, Any]) -> VideoSample:
    """One line; ids are made of video and question where none is given."""
    if unknown := sorted(set(record) - FIELDS):
        raise SampleError(f"{unknown[0]}: unknown field; known are {', '.join(sorted(FIELDS))}")
    options = tuple(str(option) for option in record.get("options") or ())
    place = record.get("video") or record.get("image")
    if not place:
        raise SampleError("video: is missing; give its path below data.root")
    answer = str(record["answer"]).strip()
    return VideoSample(
        id=str(record.get("id") or f"{place}: {record['question']}"),
        source=str(record.get("source") or "jsonl"),
        problem_type=str(record.get("problem_type") or ("multiple choice" if options else "free-form")),
        question=str(record["question"]),
        answer=_letter_of(answer, options) if options else answer,
        options=options,
        video=record.get("video"),
        image=record.get("image"),
        split=str(record.get("split") or "train"),
        duration_s=number_or_none(record.get("duration_s")),
        key_times=times(record.get("key_times")),
        extra=dict(record.get("extra") or {}),
    )


def _letter_of(answer: str, options: tuple[str, ...]) -> str:
    letters = [chr(ord("A") + index) for index in range(len(options))]
    if answer in letters:
        return answer
    matches = [letter for letter, option in zip(letters, options, strict=True) if option.strip() == answer]
    if len(matches) != 1:
        raise SampleError(
            f"answer={answer!r}: must be a letter of A-{letters[-1]} or the text of exactly one option"
        )
    return matches[0]
