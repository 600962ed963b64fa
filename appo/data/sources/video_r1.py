"""Video-R1-260K records (`Video-R1-260k.json`, and any file in that format) -> samples.

Images stand among the videos and are left out. Publishers spell sources in several ways and leave
`data_source` empty for some: aliases fold to one name, and the first folder of `path` decides where
`data_source` says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.data.sources.base import (
    Reject,
    SourceData,
    annotations_of,
    between_tags,
    number_or_none,
    read_records,
    root_of,
    times,
    without_letter,
)

NAMES = ("LLaVA-Video-178K", "STAR", "PerceptionTest", "NeXT-QA", "CLEVRER")
LETTERED = ("multiple choice", "temporal grounding")


def fold(name: str) -> str:
    """`"NExT-QA"`, `"NextQA"`, `"Next_QA/30_60_s"` -> `"NeXT-QA"`; an unknown name as it is."""
    head = name.strip().removeprefix("./").split("/")[0]
    key = re.sub(r"[^a-z0-9]", "", head.lower())
    return next((known for known in NAMES if re.sub(r"[^a-z0-9]", "", known.lower()) == key), head)


def read(recipe: Recipe, folder: Path) -> SourceData:
    files: dict[str, str] = {}
    rows = read_records(annotations_of(recipe), to_sample, id_field="problem_id", files=files)
    head = list(_until_sample(rows))
    first = next((row.video for row in head if isinstance(row, VideoSample) and row.video), "")
    return SourceData(chain(head, rows), root_of(recipe, first.split("/")[0]), files)


def _until_sample(rows: Any) -> Any:
    """Rows up to the first sample: its path tells where paths start."""
    for row in rows:
        yield row
        if not isinstance(row, Reject):
            return


def to_sample(record: Mapping[str, Any]) -> VideoSample | None:
    """One record; None for an image. Raises SampleError, KeyError or ValueError for an unusable one."""
    if record["data_type"] != "video":
        return None
    path, kind = str(record["path"]), str(record["problem_type"])
    options = tuple(without_letter(str(o), i) for i, o in enumerate(record.get("options") or ()))
    answer = between_tags(str(record["solution"]))
    if kind in LETTERED:
        answer = _letter(answer, options)
    declared = str(record.get("data_source") or "")
    extra = {"data_source": declared} if "/" in declared else {}
    return VideoSample(
        id=str(record["problem_id"]),
        source=fold(declared or path),
        problem_type=kind,
        question=str(record["problem"]),
        answer=answer,
        options=options,
        video=path.removeprefix("./"),
        duration_s=number_or_none(record.get("duration")),
        key_times=times(record.get("time_clues")),
        extra=extra,
    )


def _letter(answer: str, options: tuple[str, ...]) -> str:
    """`"B"`, `"B."` or `"B. red"` -> `"B"`; the letter must be that of an option."""
    match = re.fullmatch(r"\(?([A-Z])\)?(?:[.):]\s*(.*))?", answer, flags=re.DOTALL)
    if match is None:
        raise SampleError(f"solution={answer!r}: must be the letter of an option")
    return match.group(1)
