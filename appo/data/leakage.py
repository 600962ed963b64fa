"""A manifest and benchmarks' test videos -> which videos stand in both, by name and by content.

Training sources and benchmarks share publishers (MVBench holds STAR, CLEVRER and Perception Test videos), so
a model may have trained on what it is tested on. Equal content is certain; an equal name may be chance
(CLEVRER and Perception Test both count `video_123`), so it is listed with both paths and left to a person to
judge.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from appo.data.archives import is_archive
from appo.data.manifest import KIND, read_manifest
from appo.data.media import MediaRoot
from appo.data.schema import VideoSample
from appo.errors import UserError
from appo.storage import is_s3, read_bytes

VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
LIST_SUFFIXES = (".jsonl", ".json", ".csv", ".txt")
NAME_FIELDS = ("video", "video_name", "video_id", "video_path", "path", "video_basename")


class LeakageError(UserError, ValueError):
    """A benchmark's list that cannot be read."""


@dataclass(frozen=True, slots=True)
class TestVideos:
    """One benchmark's videos. names: stem -> path; hashes: SHA-256 -> path, empty if only names are known."""

    names: Mapping[str, str]
    hashes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Leak:
    """A training video that a benchmark has too. by: "content" or "name"; samples: how many ask about it."""

    benchmark: str
    by: str
    video: str
    benchmark_video: str
    samples: int


def test_videos(place: str) -> TestVideos:
    """What `place` names: an assembled manifest; a folder, archive or s3:// prefix of videos (hashed here, those in
    archives too); or a list of names.

    A list is JSON, JSONL or CSV with one of the fields `video`, `video_id`, `video_name`, `path`, or text
    with a name a line. Raises LeakageError for anything else.
    """
    path = Path(place)
    if path.is_dir() and (path / "manifest.jsonl").is_file():
        path = path / "manifest.jsonl"
    elif path.is_dir() or is_archive(place) or (is_s3(place) and not place.lower().endswith(LIST_SUFFIXES)):
        files = dict(MediaRoot(place).files(VIDEO_SUFFIXES))
        if not files:
            raise LeakageError(f"{place}: holds no videos; they end in {', '.join(VIDEO_SUFFIXES)}")
        return TestVideos(
            {stem(name): name for name in files}, {file.sha256(): name for name, file in files.items()}
        )
    data = read_bytes(place if is_s3(place) else path)
    if data.startswith(b'{"kind":"' + KIND.encode()):
        samples = [s for s in read_manifest(path).samples if s.video is not None]
        return TestVideos(
            {stem(s.video): s.video for s in samples if s.video},
            {s.video_sha256: s.video for s in samples if s.video_sha256 and s.video},
        )
    try:
        names = list(_names(place, data.decode("utf-8-sig")))
    except ValueError as error:  # not UTF-8, or not JSON
        raise LeakageError(f"{place}: is no list of names: {error}") from error
    if not names:
        raise LeakageError(f"{place}: holds no video names; needs one of the fields {', '.join(NAME_FIELDS)}")
    return TestVideos({stem(name): name for name in names}, {})


def find_leaks(samples: Sequence[VideoSample], benchmarks: Mapping[str, TestVideos]) -> list[Leak]:
    """Every video of the samples that a benchmark has; by content where that is known, else by name."""
    videos: dict[str, tuple[str | None, int]] = {}
    for sample in samples:
        if sample.video is not None:
            videos[sample.video] = (sample.video_sha256, videos.get(sample.video, (None, 0))[1] + 1)
    leaks = []
    for name, tests in sorted(benchmarks.items()):
        for video, (digest, count) in sorted(videos.items()):
            if digest is not None and digest in tests.hashes:
                leaks.append(Leak(name, "content", video, tests.hashes[digest], count))
            elif stem(video) in tests.names:
                leaks.append(Leak(name, "name", video, tests.names[stem(video)], count))
    return leaks


def leakage_report(samples: Sequence[VideoSample], places: Mapping[str, str]) -> dict[str, Any]:
    """Plain values for `leakage.json`: what was compared, and the leaks (an empty list says: none)."""
    benchmarks = {name: test_videos(place) for name, place in sorted(places.items())}
    compared = {
        name: {
            "list": places[name],
            "videos": len(tests.names),
            "by": "name and content" if tests.hashes else "name",
        }
        for name, tests in benchmarks.items()
    }
    return {"compared": compared, "leaks": [asdict(leak) for leak in find_leaks(samples, benchmarks)]}


def stem(name: str) -> str:
    """`"./STAR/Charades/XY12.mp4"` -> `"XY12"`; names without a video's suffix as they are."""
    last = PurePosixPath(name.strip()).name
    return last.rsplit(".", 1)[0] if last.lower().endswith(VIDEO_SUFFIXES) else last


def _names(place: str, text: str) -> Iterable[str]:
    records: Iterable[Any]
    if place.endswith(".csv"):
        records = csv.DictReader(io.StringIO(text))
    elif place.endswith(".jsonl"):
        records = (json.loads(line) for line in text.split("\n") if line.strip())
    elif place.endswith(".json"):
        loaded = json.loads(text)
        if not isinstance(loaded, list | dict):
            raise ValueError(f"must hold a list or an object, found {type(loaded).__name__}")
        records = loaded
    else:
        records = (line for line in text.splitlines() if line.strip())
    for record in records:
        if isinstance(record, str):
            yield record
        elif isinstance(record, dict):
            field = next((f for f in NAME_FIELDS if record.get(f)), None)
            if field is not None:
                yield str(record[field])
