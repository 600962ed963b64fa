"""Frames -> visual features, once; and a model that takes features where it takes pixels.

With a frozen vision tower the features of a video never change during training, so every pass after the first can
start from them. `install` lets `model(..., pixel_values_videos=features, vision_is_encoded=True)` skip the tower.
Qwen3-VL's extra features for its early decoder layers (deepstack) travel behind the ordinary ones, column by column.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


def install(model: Any) -> Any:
    """Teach `model` (a `...ForConditionalGeneration`, or a PEFT wrapper of one) to take encoded features."""
    base = base_model(model)
    if getattr(base, "_takes_features", False):
        return model
    for kind in ("video", "image"):
        setattr(base, f"get_{kind}_features", _accepting(getattr(base, f"get_{kind}_features"), base, kind))
    base._takes_features = True
    return model


def base_model(model: Any) -> Any:
    """The module that holds `visual` and `language_model`, under DDP and PEFT or not."""
    while hasattr(model, "module"):
        model = model.module
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.model


@torch.no_grad()
def encode(model: Any, pixels: Tensor, grid_thw: Tensor) -> list[Tensor]:
    """Features of each video or image, (tokens, hidden * (1 + deepstack layers)) each."""
    tower = encoding_tower(model)
    weight = next(tower.parameters())
    # A tower makes no difference between videos and images; their grids do.
    found = tower(pixels.to(weight.device, weight.dtype), grid_thw=grid_thw.to(weight.device))
    extra = getattr(found, "deepstack_features", None) or []
    sizes = (grid_thw.prod(-1) // tower.spatial_merge_size**2).tolist()
    return list(torch.cat([found.pooler_output, *extra], dim=-1).split(sizes))


def keep_tower(model: Any) -> None:
    """Keep a whole copy of the frozen tower for `encode`, before a model is sharded.

    Processes encode different videos at different times; a sharded tower would make each of them wait for all.
    """
    base = base_model(model)
    # In a tuple, or the copy would become a part of the model that is sharded and saved with it.
    base._kept_tower = (copy.deepcopy(base.visual).eval(),)


def encoding_tower(model: Any) -> Any:
    """The vision tower that `encode` runs: the model's own, or the copy that `keep_tower` made."""
    base = base_model(model)
    return getattr(base, "_kept_tower", (base.visual,))[0]


def _accepting(original: Any, base: Any, kind: str) -> Any:
    def get_features(pixels: Tensor, grid_thw: Tensor, vision_is_encoded: bool = False, **kwargs: Any) -> Any:
        for name in ("packed", "frame_probe", "scored"):  # meant for the text layers
            kwargs.pop(name, None)
        if not vision_is_encoded:
            return original(pixels, grid_thw, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        width = base.config.get_text_config().hidden_size
        sizes = (grid_thw.prod(-1) // base.visual.spatial_merge_size**2).tolist()
        main, *deep = pixels.split(width, dim=-1)
        found = BaseModelOutputWithPooling(pooler_output=main.split(sizes))
        if deep:
            found.deepstack_features = deep
        return found

    return get_features
