"""Perception Test, multiple choice -> samples.

Reads the publisher's file (an object by video id, with `mc_question` lists) or the 6K list in Video-R1's
format (`perception_test_6k.json`). data.root is the folder, archive or prefix that holds `video_3217.mp4`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.data.sources import video_r1
from appo.data.sources.base import (
    Reject,
    Row,
    SourceData,
    annotations_of,
    json_object,
    read_records,
    root_of,
)
from appo.storage import open_binary, read_bytes

SOURCE = "PerceptionTest"
NAMES = (SOURCE,)


def read(recipe: Recipe, folder: Path) -> SourceData:
    files: dict[str, str] = {}
    uri = annotations_of(recipe)
    with open_binary(uri) as stream:
        is_object = stream.read(64).lstrip().startswith(b"{")
    if is_object and not uri.endswith(".jsonl"):
        return SourceData(_rows_of_object(uri, files), root_of(recipe), files)
    rows = read_records(uri, from_list, id_field="problem_id", files=files)
    return SourceData(rows, root_of(recipe), files)


def from_list(record: Mapping[str, Any]) -> VideoSample | None:
    """A record of the 6K list: Video-R1's, with an absolute path of its authors' machine."""
    sample = video_r1.to_sample(record)
    if sample is None or sample.video is None:
        return None
    return replace(sample, source=SOURCE, video=PurePosixPath(sample.video).name)


def _rows_of_object(uri: str, files: dict[str, str]) -> Iterator[Row]:
    data = read_bytes(uri)
    files[uri.rpartition("/")[2]] = hashlib.sha256(data).hexdigest()
    for video_id, about in json_object(uri, data).items():
        for question in about.get("mc_question", ()) if isinstance(about, dict) else ():
            ident = f"{video_id}:{question.get('id')}"
            try:
                yield _from_question(ident, video_id, question)
            except KeyError as error:
                yield Reject(ident, "record", f"{error.args[0]}: is missing", video_id)
            except (SampleError, TypeError, ValueError) as error:
                yield Reject(ident, "record", str(error), video_id)


def _from_question(ident: str, video_id: str, question: Mapping[str, Any]) -> VideoSample:
    options, index = tuple(str(option) for option in question["options"]), int(question["answer_id"])
    if not 0 <= index < len(options):
        raise SampleError(f"answer_id={index}: must be an index from 0 to {len(options) - 1}")
    return VideoSample(
        id=ident,
        source=SOURCE,
        problem_type="multiple choice",
        question=str(question["question"]),
        answer=chr(ord("A") + index),
        options=options,
        video=f"{video_id}.mp4",
        extra={key: question[key] for key in ("area", "reasoning", "tag") if key in question},
    )
