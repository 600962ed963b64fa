"""Sample ids -> prompts ready for the model, kept while a run needs them.

The dataset that TRL shuffles and repeats holds ids and texts only; frames, tokens and features live here, once per
sample however many completions, passes and epochs use them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from appo.config import Recipe
from appo.data.frames import FrameSource
from appo.data.schema import VideoSample
from appo.modeling.inputs import PromptInputs, build_inputs, with_features


class PromptStore:
    """Prompts by sample id, least recently used dropped first.

    encode_once: compute visual features on first use (the tower must be frozen). capacity: prompts kept in memory;
    a step never needs more than its own.
    """

    def __init__(
        self,
        samples: Sequence[VideoSample],
        frames: FrameSource,
        processor: Any,
        recipe: Recipe,
        *,
        encode_once: bool,
        cache: Any = None,
        capacity: int = 1024,
    ):
        self._samples = {sample.id: sample for sample in samples}
        self._frames, self._processor, self._recipe = frames, processor, recipe
        self._encode_once, self._cache, self._capacity = encode_once, cache, capacity
        self._kept: OrderedDict[str, PromptInputs] = OrderedDict()

    def sample(self, sample_id: str) -> VideoSample:
        return self._samples[sample_id]

    def get(self, sample_id: str, model: Any) -> PromptInputs:
        """The prompt of a sample. Raises KeyError for an unknown id, VideoError when its frames cannot be had."""
        if (found := self._kept.get(sample_id)) is not None:
            self._kept.move_to_end(sample_id)
            return found
        sample = self._samples[sample_id]
        inputs = build_inputs(
            self._processor,
            model,
            sample,
            None if sample.video is None else self._frames.load(sample),
            self._frames.image(sample) if sample.image is not None else None,
            template=self._recipe.data.template,
        )
        if self._encode_once:
            inputs = with_features(inputs, model) if self._cache is None else self._cache.encode(inputs, model)
        self._kept[sample_id] = inputs
        while len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return inputs
