"""Sample ids -> prompts ready for the model, kept while a run needs them.

The dataset that TRL shuffles and repeats holds ids and texts only; frames, tokens and features live here,
once per sample however many completions, passes and epochs use them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from appo.config import Recipe
from appo.data.frames import FrameSource
from appo.data.schema import VideoSample
from appo.modeling.feature_cache import FeatureCache
from appo.modeling.inputs import PromptInputs, build_inputs, stripped

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
        inputs = self._build(sample_id, model)
        if self._cache is not None:
            inputs = self._cache.encode(inputs, model)
        self._keep(sample_id, inputs if self._cache is None else stripped(inputs))
        return inputs

    def _build(self, sample_id: str, model: Any) -> PromptInputs:
        sample = self._samples[sample_id]
        return build_inputs(
            self._processor,
            model,
            sample,
            None if sample.video is None else self._frames.load(sample),
            self._frames.image(sample) if sample.image is not None else None,
            template=self._recipe.data.template,
        )

    def _keep(self, sample_id: str, inputs: PromptInputs) -> None:
        self._kept[sample_id] = inputs
        self._kept_bytes += _pixel_bytes(inputs)
        while len(self._kept) > 1 and (len(self._kept) > self._capacity or self._kept_bytes > _PIXEL_BYTES):
            self._drop(next(iter(self._kept)))

    def _drop(self, sample_id: str) -> None:
        self._kept_bytes -= _pixel_bytes(self._kept.pop(sample_id))


def _pixel_bytes(inputs: PromptInputs) -> int:
    return sum(vision.pixels.nbytes for vision in (inputs.video, inputs.image) if vision is not None)
