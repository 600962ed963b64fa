"""Chosen samples -> the frames of their videos and images, decoded once, into shards.

The long part of assembly. Each file is read, hashed and decoded by a worker; rows are committed in the order
of the plan, shard by shard, and a journal tells an interrupted run what is done. Because the order of commits
is that of the plan, an interrupted and resumed run writes the same shards as one that was never interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from appo.config import Data, Video
from appo.data.clips import WHOLE, Clip, clip_of
from appo.data.frames import decode_image, decode_medium, list_rows
from appo.data.media import MediaMissing, MediaRoot, Medium, RootError
from appo.data.schema import VideoSample
from appo.data.shards import SHARD_BYTES, SHARD_ROWS, EncodedFrames, encode, shard_bytes, shard_name
from appo.data.video import VideoError, VideoFrames, decode_bytes
from appo.data.workers import Failure, WorkerPool
from appo.storage import StorageError, StoreError, UnsafePath, is_s3, read_bytes, safe_relative, write

VIDEO, IMAGE = "video", "image"


@dataclass(frozen=True, slots=True)
class Item:
    """One file to decode. kind: VIDEO or IMAGE; name: as the samples name it; clip: what of it."""

    kind: str
    name: str
    clip: Clip = WHOLE


def items_of(sample: VideoSample) -> Iterator[Item]:
    """The files that a sample needs."""
    if sample.video is not None:
        yield video_item(sample)
    if sample.image is not None:
        yield Item(IMAGE, sample.image)


def video_item(sample: VideoSample) -> Item:
    assert sample.video is not None
    return Item(VIDEO, sample.video, clip_of(sample))


@dataclass(frozen=True, slots=True)
class Decoded:
    """What is known of a file afterwards. sha256 of the whole file, or what its clip is stored under; num_frames
    sampled (1 for an image)."""

    sha256: str
    duration_s: float
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Rejected:
    stage: str
    reason: str


Outcome = Decoded | Rejected
_Task = tuple[Item, Medium]
_Answer = tuple[Decoded, EncodedFrames | None]


def decode_all(
    items: Iterable[Item],
    *,
    root: MediaRoot,
    video: Video,
    data: Data,
    place: str | None,
    journal: Path,
    done: Callable[[Item, Outcome], None],
    on_row: Callable[[EncodedFrames], None] = lambda row: None,
    may_be_gone: bool = False,
) -> None:
    """Decode every item once and call `done` for each.

    place: folder or s3:// URI of the shards, None to check that everything decodes without keeping the
    frames. journal: appended to; with it, a run that was stopped goes on where the last shard ended. Beside
    shards in S3 notes take its place, so that a new pod goes on too. on_row: called with each new row, before `done`
    and before its shard is written. may_be_gone: a file that was decoded and has been deleted since still counts.
    Raises RootError when nothing can be read, StoreError when the store fails in between.
    """
    if not may_be_gone:
        root.check()
    finished = _read_notes(place, journal)
    stored = stored_keys(place) if place is not None else set()
    writer = _Writer(place, journal)
    gone = {_without_stamp(key): past for key, past in finished.items()} if may_be_gone else {}

    def tasks() -> Iterator[_Task]:
        for item in items:
            try:
                medium = root.find(item.name)
            except RootError:
                raise
            except MediaMissing as error:
                past = gone.get(
                    _without_stamp(f"{item.kind}{_of(item.clip)} {root.root}/{safe_relative(item.name)} ")
                )
                known = past is not None and past.sha256 in stored
                done(item, past if past is not None and known else Rejected("path", str(error)))
                continue
            except (UnsafePath, StorageError) as error:
                done(item, Rejected("path", str(error)))
                continue
            past = finished.get(_journal_key(item, medium))
            if past is not None and (place is None or past.sha256 in stored):
                done(item, past)
            else:
                yield item, medium

    make = partial(make_decoder, video, data, place is not None, frozenset(stored))
    pool: WorkerPool[_Task, _Answer] = WorkerPool(
        make, workers=data.workers, timeout_s=data.decode_timeout_s, memory_gib=data.worker_memory_gib
    )
    with pool:
        for (item, medium), result in pool.run(tasks()):
            if isinstance(result, Failure):
                if result.fatal:  # which videos a store's bad minute hits must not decide what is trained on
                    raise StoreError(f"{result.reason}; nothing is rejected for that: run it again")
                done(item, Rejected("decode", result.reason))
                continue
            decoded, row = result
            if row is not None and row.key not in stored:
                stored.add(row.key)
                writer.add(row)
                on_row(row)
            writer.note(_journal_key(item, medium), decoded)
            done(item, decoded)
    writer.flush()


def make_decoder(
    video: Video, data: Data, keep: bool, stored: frozenset[str]
) -> Callable[[_Task], _Answer | Failure]:
    """What a worker does with one file. `stored` are hashes whose frames are in the shards already."""
    import decord  # noqa: F401 - loaded before the first deadline starts

    def work(task: _Task) -> _Answer | Failure:
        item, medium = task
        try:
            payload = None if medium.local is not None else medium.read()
            found = medium.sha256() if payload is None else hashlib.sha256(payload).hexdigest()
            digest = item.clip.key(found)
            frames = _decode(item, medium, payload, video)
        except (VideoError, StorageError) as error:
            return Failure(str(error), fatal=isinstance(error, StoreError))
        decoded = Decoded(digest, frames.duration_s, len(frames.frames), *frames.frames.shape[1:3])
        if not keep or digest in stored:
            return decoded, None
        return decoded, encode(digest, frames, encoding=data.encoding, jpeg_quality=data.jpeg_quality)

    return work


def _decode(item: Item, medium: Medium, payload: bytes | None, video: Video) -> VideoFrames:
    if item.kind == IMAGE:
        return still(decode_image(medium, video))
    if payload is None:
        return decode_medium(medium, video, item.clip)
    return decode_bytes(payload, video, name=medium.uri, part=item.clip.part)


def still(pixels: object) -> VideoFrames:
    """An image as a row of its own: one frame, no duration."""
    import numpy as np

    return VideoFrames(np.asarray(pixels)[None], np.zeros(1), (0,), 1.0, 0.0, 1)


def stored_keys(place: str) -> set[str]:
    """Hashes of the files whose frames are in the shards at `place`."""
    return {key for _, keys, _ in list_rows(place) for key in keys}


def _journal_key(item: Item, medium: Medium) -> str:
    return f"{item.kind}{_of(item.clip)} {medium.uri} {medium.stamp}"


def _of(clip: Clip) -> str:
    return "" if clip == WHOLE else f"[{clip.part},{clip.fps}]".replace(" ", "")


def _without_stamp(key: str) -> str:
    """The suffix in small letters: `MediaRoot.find` takes `.MP4` for `.mp4`, which leaves nothing to find."""
    stem, dot, suffix = key.rpartition(" ")[0].rpartition(".")
    return f"{stem}{dot}{suffix.lower()}"


def _read_notes(place: str | None, journal: Path) -> dict[str, Decoded]:
    """What earlier runs finished: from the journal, or from the notes beside shards in S3."""
    if place is None or not is_s3(place):
        return _parsed(journal.read_text("utf-8")) if journal.is_file() else {}
    from appo.objectstore import list_objects

    names = sorted(name for name, _ in list_objects(place) if name.startswith("notes-"))
    return {k: v for name in names for k, v in _parsed(read_bytes(f"{place}/{name}").decode()).items()}


def _parsed(text: str) -> dict[str, Decoded]:
    """A last line that was cut off by a kill is passed over: its work is done again."""
    found: dict[str, Decoded] = {}
    for line in text.split("\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
            name = record.pop("file")
            found[name] = Decoded(**record)
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


class _Writer:
    """Collects rows into shards. The journal names a file only after the shard with its frames is on disk."""

    def __init__(self, place: str | None, journal: Path):
        self._place, self._journal = place, journal
        self._rows: list[EncodedFrames] = []
        self._bytes = 0
        self._notes: list[str] = []

    def add(self, row: EncodedFrames) -> None:
        self._rows.append(row)
        self._bytes += row.nbytes

    def note(self, file: str, decoded: Decoded) -> None:
        self._notes.append(json.dumps({"file": file, **asdict(decoded)}, ensure_ascii=False))
        if len(self._rows) >= SHARD_ROWS or self._bytes >= SHARD_BYTES or len(self._notes) >= 4 * SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            assert self._place is not None
            write(f"{self._place}/{shard_name(self._rows)}", shard_bytes(self._rows))
        if self._notes:
            self._keep_notes("\n".join(self._notes) + "\n")
        self._rows, self._bytes, self._notes = [], 0, []

    def _keep_notes(self, text: str) -> None:
        if self._place is not None and is_s3(self._place):  # objects cannot be appended to
            write(f"{self._place}/notes-{hashlib.sha256(text.encode()).hexdigest()[:24]}.jsonl", text)
            return
        self._journal.parent.mkdir(parents=True, exist_ok=True)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write("\n" + text)  # a line that a kill cut off must not swallow the first of these
            file.flush()
            os.fsync(file.fileno())
