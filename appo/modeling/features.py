"""Frames -> visual features, once; and a model that takes features where it takes pixels.

With a frozen vision tower the features of a video never change during training, so every pass after the first can
start from them. `install` lets `model(..., pixel_values_videos=features, vision_is_encoded=True)` skip the tower.
Qwen3-VL's extra features for its early decoder layers (deepstack) travel behind the ordinary ones, column by column.
"""

from __future__ import annotations

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
    tower = base_model(model).visual
    weight = next(tower.parameters())
    # A tower makes no difference between videos and images; their grids do.
    found = tower(pixels.to(weight.device, weight.dtype), grid_thw=grid_thw.to(weight.device))
    extra = getattr(found, "deepstack_features", None) or []
    sizes = (grid_thw.prod(-1) // tower.spatial_merge_size**2).tolist()
    return list(torch.cat([found.pooler_output, *extra], dim=-1).split(sizes))


def detach_tower(model: Any, dtype: torch.dtype) -> Any:
    """Take a frozen tower out of the model's module tree, cast to `dtype`; `base.visual` still names it. Returns it.

    What walks over modules then leaves it alone: it is neither sharded, wrapped nor moved with the model, takes no
    adapters and stands in no resumable checkpoint. Every process keeps it whole, since processes encode different
    videos at different times and a sharded tower would make each of them wait for all. See `attach_tower`.
    """
    base = base_model(model)
    tower = _plain(base._modules.pop("visual")).to(dtype).eval()
    base.__dict__["visual"] = tower
    # accelerate looks for a module of every class that is named here.
    kept = {type(module).__name__ for module in model.modules()}
    for holder in model.modules():
        if getattr(holder, "_no_split_modules", None):
            holder._no_split_modules = [name for name in holder._no_split_modules if name in kept]
    return tower


def _plain(tower: Any) -> Any:
    """The tower itself, or a whole copy of one that DeepSpeed partitioned while it was loaded. Collective then."""
    partitioned = [parameter for parameter in tower.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        return tower
    from deepspeed.runtime.zero import GatheredParameters

    whole = type(tower)(tower.config).requires_grad_(False)
    with torch.no_grad(), GatheredParameters(partitioned):
        for theirs, ours in zip(tower.parameters(), whole.parameters(), strict=True):
            ours.copy_(theirs)
    return whole


def attach_tower(model: Any, tower: Any) -> None:
    """Let `model`, whose tower was detached, use `tower`: the reference model uses the policy's."""
    base_model(model).__dict__["visual"] = tower


def tower_names(model: Any) -> dict[str, Tensor]:
    """Parameters and buffers of a detached tower under their names in the whole model; nothing where it is attached."""
    base = base_model(model)
    if "visual" in base._modules:
        return {}
    return {f"model.visual.{name}": tensor for name, tensor in base.visual.state_dict().items()}


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
