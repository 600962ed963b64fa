"""Items of a benchmark -> prepared prompts, made ahead in threads and kept for the next checkpoint.

The frames come from the same sources and the tensors from the same function as in training.
"""

from __future__ import annotations

import copy
import hashlib
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from appo.data.clips import Clip, clip_of
from appo.data.media import MediaMissing
from appo.data.schema import VideoSample
from appo.data.video import VideoError
from appo.evaluation.prefetch import Prefetch
from appo.storage import UnsafePath

if TYPE_CHECKING:
    from PIL.Image import Image

    from appo.data.frames import FrameSource
    from appo.data.video import VideoFrames
    from appo.modeling.inputs import PromptInputs, Vision

KEPT_BYTES = 1 << 30
VIDEOS_KEPT = 16  # for the next question about one of them
Film = tuple[int, str, Clip]  # a source, a video of it, and which part


def positions_model(config_path: str) -> Any:
    """A model without weights: what is needed of it are the rotary positions of a prompt."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from appo.modeling import positions
    from appo.modeling.checkpoints import loading

    with loading(config_path), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(config_path))
    return positions.install(model)


class PromptMaker:
    """Makes, and keeps while they are few, the prompts of one processor. Safe to call from several threads, which
    work beside one another.

    What is asked about one video in a row is decoded and processed once.
    """

    def __init__(self, processor: Any, model: Any):
        self._processor, self._model = processor, model
        self._free: SimpleQueue[Any] = (
            SimpleQueue()
        )  # copies of the processor: tokenizers forbid concurrent use
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], PromptInputs] = OrderedDict()
        self._kept_bytes = 0
        self._seen: OrderedDict[Film, tuple[VideoFrames, Vision]] = OrderedDict()
        self._sources = threading.local()

    def make(self, sample: VideoSample, frames: FrameSource, template: str) -> PromptInputs:
        """Raises VideoError when the sample's video gives no frames."""
        key = (sample.id, template)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._borrowed_processor() as processor:
            made = self._build(processor, sample, frames, template)
        with self._lock:
            if key not in self._kept:
                self._keep(key, made)
        return made

    def _build(self, processor: Any, sample: VideoSample, frames: FrameSource, template: str) -> PromptInputs:
        from appo.modeling.inputs import build_inputs

        film: Film | None = None
        if sample.video is not None and sample.image is None:
            film = id(frames), sample.video, clip_of(sample)
        with self._lock:
            seen = None if film is None else self._seen.get(film)
        if seen is not None:
            blank, vision = seen
            grids = {"video": vision.grid_thw}
            made = build_inputs(processor, self._model, sample, blank, None, template=template, grids=grids)
            return replace(made, video=vision)
        video, image = self._look(sample, frames)
        made = build_inputs(processor, self._model, sample, video, image, template=template)
        made = replace(made, video=_named(made.video), image=_named(made.image))
        if film is not None and video is not None and made.video is not None:
            blank = replace(
                video, frames=video.frames[:, :0, :0].copy()
            )  # a copy: a view would keep the pixels
            with self._lock:
                self._seen[film] = blank, made.video
                while len(self._seen) > VIDEOS_KEPT:
                    self._seen.popitem(last=False)
        return made

    @contextmanager
    def _borrowed_processor(self) -> Iterator[Any]:
        try:
            processor = self._free.get_nowait()
        except Empty:
            with self._lock:
                processor = copy.deepcopy(self._processor)
        try:
            yield processor
        finally:
            self._free.put(processor)

    def _look(self, sample: VideoSample, frames: FrameSource) -> tuple[VideoFrames | None, Image | None]:
        from appo.data.frames import DecodedFrames

        if isinstance(frames, DecodedFrames):
            frames = self._source_of_thread(frames)
        return None if sample.video is None else frames.load(sample), frames.image(sample)

    def _source_of_thread(self, frames: FrameSource) -> FrameSource:
        """Archives are open files that threads may not share, but a source may be copied."""
        copies: dict[int, FrameSource] = self._sources.__dict__.setdefault("copies", {})
        if id(frames) not in copies:
            copies[id(frames)] = pickle.loads(pickle.dumps(frames))
        return copies[id(frames)]

    def _keep(self, key: tuple[str, str], made: PromptInputs) -> None:
        self._kept[key] = made
        self._kept_bytes += _size(made)
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= _size(dropped)


def _named(vision: Vision | None) -> Vision | None:
    """With the hash of its pixels, which prompt's digest and vLLM's caches go by: taken here, beside generation."""
    if vision is None:
        return None
    return replace(vision, key=hashlib.sha256(vision.pixels.numpy()).hexdigest())


def _size(prompt: PromptInputs) -> int:
    visions = [vision for vision in (prompt.video, prompt.image) if vision is not None]
    return sum(vision.pixels.nbytes for vision in visions)


@dataclass(slots=True)
class PromptStream:
    """What an engine takes prompts from. Items whose video fails are left out and noted in `failed`."""

    prefetch: Prefetch[tuple[str, PromptInputs | VideoError]]
    on_prompt: Callable[[str, PromptInputs], None] = lambda name, prompt: None
    failed: dict[str, VideoError] = field(default_factory=dict)

    def take(self, *, wait: bool) -> tuple[str, PromptInputs] | None:
        while (taken := self.prefetch.take(wait=wait)) is not None:
            name, made = taken
            if isinstance(made, VideoError):
                self.failed[name] = made
                continue
            self.on_prompt(name, made)
            return name, made
        return None


def jobs(
    maker: PromptMaker, samples: Sequence[VideoSample], frames: FrameSource, template: str
) -> list[Callable[[], tuple[str, PromptInputs | VideoError]]]:
    """One job a sample, for `Prefetch`."""

    def job(sample: VideoSample) -> tuple[str, PromptInputs | VideoError]:
        try:
            return sample.id, maker.make(sample, frames, template)
        except VideoError as error:
            return sample.id, error
        except (MediaMissing, UnsafePath) as error:
            return sample.id, VideoError(sample.id, str(error))

    return [lambda sample=sample: job(sample) for sample in samples]  # type: ignore[misc]


def prompt_digest(prompt: PromptInputs) -> str:
    """16 hex digits over everything the model is given: text, tokens, pixels, grid, times."""
    digest = hashlib.sha256(prompt.text.encode())
    digest.update(prompt.ids.numpy().tobytes())
    digest.update(prompt.seconds_per_grid.numpy().tobytes())
    for vision in (prompt.video, prompt.image):
        if vision is not None:
            digest.update(vision.grid_thw.numpy().tobytes())
            digest.update((vision.key or hashlib.sha256(vision.pixels.numpy()).hexdigest()).encode())
    return digest.hexdigest()[:16]
