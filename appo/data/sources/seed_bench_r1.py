"""SEED-Bench-R1 -> samples with a video of what was done and an image of what is seen now.

Training records give the answer and two or more wrong ones: up to three of them are drawn and the options put
in order by (data.seed, sample id), so that a question is the same in each run and on each machine. Test
records give four choices and the letter of the right one. A record without `task_progress_metadata` has no
video.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.data.sources.base import SourceData, annotations_of, number_or_none, read_records, root_of
from appo.data.subset import rank

SOURCE, WRONG_OPTIONS = "SEED-Bench-R1", 3
NAMES = (SOURCE,)


def read(recipe: Recipe, folder: Path) -> SourceData:
    files: dict[str, str] = {}
    make = partial(to_sample, seed=recipe.data.seed)
    rows = read_records(annotations_of(recipe), make, id_field="sample_id", files=files)
    return SourceData(rows, root_of(recipe), files)


def to_sample(record: Mapping[str, Any], *, seed: int) -> VideoSample:
    ident, place = str(record["sample_id"]), str(record["video_source"])
    if "golden_choice_idx" in record:
        options = [str(record[f"choice_{letter}"]) for letter in "abcd"]
        answer = str(record["golden_choice_idx"])
    else:
        options, answer = draw_options(
            str(record["answer"]), record["negative_answers"], seed=seed, ident=ident
        )
    progress = record["task_progress_metadata"]
    extra = {key: record[key] for key in ("video_id", "task_goal") if record.get(key)}
    return VideoSample(
        id=ident,
        source=SOURCE,
        problem_type="multiple choice",
        question=str(record["question"]),
        answer=answer,
        options=tuple(options),
        video=f"videos/{place}/{record['video_basename']}" if progress else None,
        image=f"images/{place}/{record['current_observation_basename']}",
        duration_s=number_or_none(record.get("duration")) if progress else None,
        extra=extra,
    )


def draw_options(answer: str, wrong: Any, *, seed: int, ident: str) -> tuple[list[str], str]:
    """The options in their order, and the letter of the right one."""
    candidates = sorted({str(text) for text in wrong} - {answer})
    if not candidates:
        raise SampleError(f"negative_answers={wrong!r}: needs at least one answer that is wrong")
    drawn = sorted(candidates, key=lambda text: rank(seed, ident, "draw", text))[:WRONG_OPTIONS]
    options = sorted([answer, *drawn], key=lambda text: rank(seed, ident, "order", text))
    return options, chr(ord("A") + options.index(answer))
