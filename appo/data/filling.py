"""A benchmark's videos -> their frames, out of shards that are filled while they are read.

The same shards, decoder and journal as assembly's: worker processes decode ahead, in the order of the questions, while
answers are generated. What a run decoded no later one decodes again, whatever the checkpoint or the seed, and a video
that was deleted since is still found by its name.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from appo.config import Data, Video
from appo.data.decoding import IMAGE, Item, Outcome, Rejected, decode_all, items_of, video_item
from appo.data.frames import ShardFrames, as_image
from appo.data.media import MediaRoot
from appo.data.schema import VideoSample
from appo.data.shards import EncodedFrames, decode
from appo.data.video import VideoError, VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image


class FilledFrames(ShardFrames):
    """Frames of the samples that `filling` was given; safe to read from several threads while it lasts."""

    def __init__(self, root: str, video: Video, data: Data, *, place: str, journal: Path):
        """root: where the samples' paths start; place: folder or s3:// URI of the shards; journal: see `decode_all`."""
        super().__init__(place)
        self._root, self._video, self._data, self._journal = root, video, data, journal
        self._outcomes: dict[Item, Future[Outcome]] = {}

    @contextmanager
    def filling(
        self, samples: Sequence[VideoSample], *, on_file: Callable[[Outcome], None] = lambda outcome: None
    ) -> Iterator[None]:
        """While inside, the samples' files are decoded in their order, ahead of whoever asks; leaving early stops
        after those at work. on_file: called as each file is done, in the decoding thread."""
        items = list(dict.fromkeys(item for sample in samples for item in items_of(sample)))
        self._outcomes = {item: Future() for item in items}
        stopped = threading.Event()

        def done(item: Item, outcome: Outcome) -> None:
            self._outcomes[item].set_result(outcome)
            on_file(outcome)

        def fill() -> None:
            try:
                decode_all(
                    takewhile(lambda _: not stopped.is_set(), items),
                    root=MediaRoot(self._root),
                    video=self._video,
                    data=self._data,
                    place=self._place,
                    journal=self._journal,
                    done=done,
                    on_row=self._hold,
                    may_be_gone=True,
                )
            except Exception as error:  # whoever waits for a file gets it
                self._fail(error)

        thread = threading.Thread(target=fill, name="filling")
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            self._fail(RuntimeError("decoding was stopped"))

    def fill(
        self, samples: Sequence[VideoSample], *, on_file: Callable[[Outcome], None] = lambda outcome: None
    ) -> None:
        """Decode all of the samples' files that the shards lack, and return when they are stored."""
        with self.filling(samples, on_file=on_file):
            for outcome in self._outcomes.values():
                outcome.result()

    def load(self, sample: VideoSample) -> VideoFrames:
        if sample.video is None:
            raise VideoError(sample.id, "has no video, only an image")
        return self._decoded(video_item(sample), sample)

    def image(self, sample: VideoSample) -> Image | None:
        if sample.image is None:
            return None
        return as_image(self._decoded(Item(IMAGE, sample.image), sample).frames[0])

    def _decoded(self, item: Item, sample: VideoSample) -> VideoFrames:
        outcome = self._outcomes[item].result()
        if isinstance(outcome, Rejected):
            raise VideoError(sample.id, outcome.reason)
        return decode(self.row(outcome.sha256, sample.id))

    def _hold(self, row: EncodedFrames) -> None:
        """Keep a row for whoever asks before its shard is written; far more is kept than a shard holds."""
        with self._lock:
            self._keep(row)

    def _fail(self, error: Exception) -> None:
        for outcome in self._outcomes.values():
            if not outcome.done():
                outcome.set_exception(error)
