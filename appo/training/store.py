"""Sample ids -> prompts ready for the model, kept while a run needs them.

The dataset that TRL shuffles and repeats holds ids and texts only; frames, tokens and features live here,
once per sample however many completions, passes and epochs use them. Where features are kept under the name of
a video and found, its frames are not even read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from appo.config import Recipe
from appo.data.frames import FrameSource, image_sha256
from appo.data.schema import VideoSample
from appo.data.video import VideoFrames
from appo.modeling.feature_cache import Encoded, FeatureCache
from appo.modeling.inputs import PromptInputs, build_inputs, pixel_settings, stripped

if TYPE_CHECKING:
    from PIL.Image import Image

# Of pixels kept where features may not be; a step's own prompts are held by the step.
_PIXEL_BYTES = 2 << 30


class PromptStore:
    """Prompts by sample id, least recently used dropped first.

    cache: keeps the visual features, under its own bounds, once per video whatever asks for it; the tower
    must be frozen. None keeps pixels, and every pass encodes them. capacity: prompts kept in memory; a step
    never needs more than its own.
    """

    def __init__(
        self,
        samples: Sequence[VideoSample],
        frames: FrameSource,
        processor: Any,
        recipe: Recipe,
        *,
        cache: FeatureCache | None = None,
        capacity: int = 16384,
    ):
        self._samples = {sample.id: sample for sample in samples}
        self._frames, self._processor, self._recipe = frames, processor, recipe
        self._cache, self._capacity = cache, capacity
        self._scaling = "" if cache is None else pixel_settings(processor)
        self._kept: OrderedDict[str, PromptInputs] = OrderedDict()
        self._kept_bytes = 0

    def sample(self, sample_id: str) -> VideoSample:
        return self._samples[sample_id]

    def get(self, sample_id: str, model: Any) -> PromptInputs:
        """The prompt of a sample. Raises KeyError for an unknown id, VideoError when its frames cannot be
        had.
        """
        if (kept := self._kept.get(sample_id)) is not None:
            found = kept if self._cache is None else self._cache.restore(kept)
            if found is not None:
                self._kept.move_to_end(sample_id)
                return found
            self._drop(sample_id)  # its features had to make room
        inputs = self._from_features(sample_id, model) or self._from_frames(sample_id, model)
        self._keep(sample_id, inputs if self._cache is None else stripped(inputs))
        return inputs

    def _from_frames(self, sample_id: str, model: Any) -> PromptInputs:
        sample = self._samples[sample_id]
        frames = None if sample.video is None else self._frames.load(sample)
        image = self._frames.image(sample) if sample.image is not None else None
        inputs = build_inputs(
            self._processor, model, sample, frames, image, template=self._recipe.data.template
        )
        if self._cache is None:
            return inputs
        facts = None if frames is None else _facts(frames)
        return self._cache.encode(inputs, model, self._names(sample, self._cache), facts)

    def _from_features(self, sample_id: str, model: Any) -> PromptInputs | None:
        """The prompt without its frames; None where a part of it has no name, or its features are not kept."""
        sample, cache = self._samples[sample_id], self._cache
        if cache is None:
            return None
        names = self._names(sample, cache)
        parts = {"video": sample.video, "image": sample.image}
        found: dict[str, Encoded] = {}
        for kind in (kind for kind, file in parts.items() if file is not None):
            entry = cache.find(names[kind]) if kind in names else None
            if entry is None:
                return None
            found[kind] = entry
        inputs = build_inputs(
            self._processor,
            model,
            sample,
            _blank_frames(found["video"].facts) if "video" in found else None,
            _blank_image() if "image" in found else None,
            template=self._recipe.data.template,
            grids={kind: entry.grid_thw for kind, entry in found.items()},
        )
        named = {
            kind: replace(getattr(inputs, kind), features=entry.features, key=names[kind])
            for kind, entry in found.items()
        }
        return replace(inputs, **named)

    def _names(self, sample: VideoSample, cache: FeatureCache) -> dict[str, str]:
        """The cache's keys for the parts of a sample whose file's hash stands in the manifest."""
        hashes = {"video": sample.video_sha256, "image": image_sha256(sample)}
        return {
            kind: cache.named(kind, f"{self._frames.identity(sha256)} {self._scaling}")
            for kind, sha256 in hashes.items()
            if sha256 is not None
        }

    def _keep(self, sample_id: str, inputs: PromptInputs) -> None:
        self._kept[sample_id] = inputs
        self._kept_bytes += _pixel_bytes(inputs)
        while len(self._kept) > 1 and (len(self._kept) > self._capacity or self._kept_bytes > _PIXEL_BYTES):
            self._drop(next(iter(self._kept)))

    def _drop(self, sample_id: str) -> None:
        self._kept_bytes -= _pixel_bytes(self._kept.pop(sample_id))


def _facts(frames: VideoFrames) -> dict[str, Any]:
    """All but the pixels; the inverse is `_blank_frames`."""
    return {
        "timestamps_s": frames.timestamps_s.tolist(),
        "frame_indices": list(frames.frame_indices),
        "fps": frames.fps,
        "duration_s": frames.duration_s,
        "total_frames": frames.total_frames,
    }


def _blank_frames(facts: Mapping[str, Any]) -> VideoFrames:
    times = np.asarray(facts["timestamps_s"], dtype=np.float64)
    return VideoFrames(
        frames=np.empty((len(times), 0, 0, 3), dtype=np.uint8),
        timestamps_s=times,
        frame_indices=tuple(facts["frame_indices"]),
        fps=facts["fps"],
        duration_s=facts["duration_s"],
        total_frames=facts["total_frames"],
    )


def _blank_image() -> Image:
    from PIL import Image

    return Image.new("RGB", (1, 1))


def _pixel_bytes(inputs: PromptInputs) -> int:
    return sum(vision.pixels.nbytes for vision in (inputs.video, inputs.image) if vision is not None)
