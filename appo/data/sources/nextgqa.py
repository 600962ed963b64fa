"""NExT-GQA, questions with the times that their answers show -> samples for temporal grounding.

Reads the publisher's files (`val.csv` or `test.csv`, with `gsub_val.json` beside it, and
`map_vid_vidorID.json` where videos lie in VidOR's folders) or the 3K list made from them (a JSON list,
`nextgqa_val_3k3.json`). In the CSV an answer is the text of the right option, in the list it is its index.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from appo.config import Recipe
from appo.data.schema import SampleError, VideoSample
from appo.data.sources.base import (
    Reject,
    Row,
    SourceData,
    annotations_of,
    json_object,
    number_or_none,
    read_records,
    root_of,
)
from appo.storage import StorageError, read_bytes

SOURCE, KIND = "NExT-GQA", "temporal grounding"
NAMES = (SOURCE,)
MAP_FILE = "map_vid_vidorID.json"


def read(recipe: Recipe, folder: Path) -> SourceData:
    files: dict[str, str] = {}
    uri = annotations_of(recipe)
    if uri.endswith(".csv"):
        return SourceData(_rows_of_csv(uri, files), root_of(recipe), files)
    rows = read_records(uri, from_list, id_field="qid", files=files)
    return SourceData(rows, root_of(recipe), files)


def from_list(record: Mapping[str, Any]) -> VideoSample:
    """A record of the 3K list: paths are those of its authors' machine, only the file name counts."""
    options, index = tuple(str(option) for option in record["options"]), int(record["answer"])
    if not 0 <= index < len(options):
        raise SampleError(f"answer={index}: must be an index from 0 to {len(options) - 1}")
    video, duration = PurePosixPath(str(record["video_path"])).name, number_or_none(record.get("duration"))
    return _sample(
        PurePosixPath(video).stem,
        str(record["qid"]),
        record,
        options,
        index,
        video,
        record["time_clues"],
        duration,
    )


def _rows_of_csv(uri: str, files: dict[str, str]) -> Iterator[Row]:
    import hashlib

    folder, _, name = uri.rpartition("/")
    beside = f"{folder}/" if folder else ""
    spans_name = f"gsub_{name.removesuffix('.csv')}.json"
    found = {}
    for needed in (name, spans_name, MAP_FILE):
        try:
            data = read_bytes(beside + needed)
        except StorageError:
            if needed == MAP_FILE:  # videos lie flat
                continue
            raise
        found[needed] = data
        files[needed] = hashlib.sha256(data).hexdigest()
    spans = json_object(beside + spans_name, found[spans_name])
    places = json_object(beside + MAP_FILE, found.get(MAP_FILE, b"{}"))
    try:
        table = found[name].decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"{uri}: is not UTF-8 text: {error}") from error
    for row in csv.DictReader(io.StringIO(table, newline="")):
        ident = f"{row.get('video_id')}_{row.get('qid')}"
        try:
            yield _from_row(row, spans, places)
        except (SampleError, KeyError, TypeError, ValueError) as error:
            reason = f"{error.args[0]}: is missing" if isinstance(error, KeyError) else str(error)
            yield Reject(ident, "record", reason)


def _from_row(row: Mapping[str, str], spans: Mapping[str, Any], places: Mapping[str, str]) -> VideoSample:
    video_id, qid = row["video_id"], row["qid"]
    options = tuple(row[f"a{index}"] for index in range(5))
    if row["answer"] in options:
        index = options.index(row["answer"])
    elif row["answer"].isdigit() and int(row["answer"]) < len(options):  # NExT-QA's own CSV
        index = int(row["answer"])
    else:
        raise SampleError(f"answer={row['answer']!r}: must be one of a0 to a4")
    about = spans.get(video_id)
    if about is None or qid not in about["location"]:
        raise SampleError("location: no times are given for this question; it cannot be scored")
    video = f"{places.get(video_id, video_id)}.mp4"
    return _sample(
        video_id, qid, row, options, index, video, about["location"][qid], float(about["duration"])
    )


def _sample(
    video_id: str,
    qid: str,
    record: Mapping[str, Any],
    options: Sequence[str],
    index: int,
    video: str,
    spans: Sequence[Sequence[float]],
    duration_s: float | None,
) -> VideoSample:
    limit = duration_s if duration_s is not None else float("inf")
    # A few published spans end after their video does.
    clipped = [(float(start), min(float(end), limit)) for start, end in spans]
    kept = tuple(sorted((start, end) for start, end in clipped if end > start))
    if not kept:
        raise SampleError(f"time_clues={spans!r}: holds no span inside the video's {limit:g} s")
    return VideoSample(
        id=f"{video_id}_{qid}",
        source=SOURCE,
        problem_type=KIND,
        question=str(record["question"]),
        answer=chr(ord("A") + index),
        options=tuple(options),
        video=video,
        duration_s=duration_s,
        key_times=kept,
        extra={"question_type": str(record.get("qtype") or record.get("type") or "")},
    )
