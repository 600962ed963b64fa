"""Multimodal rotary positions as Qwen2-VL and Qwen2.5-VL were trained with, in every engine alike.

transformers 5.17 numbers the text after a video from `start + max(h, w)` of the grid and truncates the seconds per
temporal patch to whole seconds. The released models, and vLLM, number it from the largest position so far plus one
and scale by the real seconds (Qwen2-VL paper, section 2.1; Qwen2.5-VL report, section 2.1.2; vLLM
`Qwen2_5_VLForConditionalGeneration.get_mrope_input_positions`). Where a video is longer than its grid is wide, the two
differ: generation would then run on other positions than scoring. `install` puts the released rule into a model.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

TEXT, IMAGE, VIDEO = 0, 1, 2

# Qwen3-VL writes each frame as a vision block of its own with its time in text, where the two rules agree.
FAMILIES_TO_CORRECT = ("qwen2_vl", "qwen2_5_vl")


def rope_positions(
    token_types: Tensor,
    grids: Iterator[tuple[int, tuple[int, int, int], float]],
    *,
    merge_size: int,
    tokens_per_second: float,
) -> Tensor:
    """Positions of one unpadded sequence.

    token_types: (L,) 0 text, 1 image, 2 video. grids: (type, (t, h, w) before merging, seconds per temporal patch)
    in order of appearance. Seconds are float32 numbers, as every processor of these families hands them on. Returns
    (3, L) long: temporal, height, width.
    """
    blocks: list[Tensor] = []
    following = 0
    for kind, run in groupby(token_types.tolist()):
        length = len(list(run))
        # Two videos in direct succession form one run of tokens, hence a loop over grids.
        while length:
            if kind == TEXT:
                block = torch.arange(length).expand(3, -1)
            else:
                _, (t, h, w), seconds = next(grids)
                factor = seconds * tokens_per_second if kind == VIDEO else 1.0
                block = torch.stack(
                    torch.meshgrid(
                        # In float64, as vLLM: a float32 product may round up to the next whole position.
                        (torch.arange(t, dtype=torch.float64) * factor).long(),
                        torch.arange(h // merge_size),
                        torch.arange(w // merge_size),
                        indexing="ij",
                    )
                ).reshape(3, -1)
            blocks.append(block + following)
            following = int(blocks[-1].max()) + 1
            length -= block.shape[1]
    return torch.cat(blocks, dim=1)


def _get_rope_index(
    self: Any,
    input_ids: Tensor,
    mm_token_type_ids: Tensor,
    image_grid_thw: Tensor | None = None,
    video_grid_thw: Tensor | None = None,
    second_per_grid_ts: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Same signature and returns as transformers' `get_rope_index`: positions (3, B, L) and deltas (B, 1)."""
    vision = self.config.vision_config
    images = iter([] if image_grid_thw is None else image_grid_thw.tolist())
    videos = iter([] if video_grid_thw is None else video_grid_thw.tolist())
    seconds = iter([] if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).tolist())

    def grids(types_of_row: Tensor) -> Iterator[tuple[int, tuple[int, int, int], float]]:
        for kind, _run in groupby(types_of_row.tolist()):
            if kind == IMAGE:
                yield IMAGE, tuple(next(images)), 1.0
            elif kind == VIDEO:
                yield VIDEO, tuple(next(videos)), next(seconds, 1.0)

    positions = torch.zeros(3, *input_ids.shape, dtype=torch.long, device=input_ids.device)
    deltas = []
    for row in range(input_ids.shape[0]):
        keep = (
            torch.ones_like(input_ids[row], dtype=torch.bool)
            if attention_mask is None
            else attention_mask[row].bool()
        )
        types_of_row = mm_token_type_ids[row][keep].cpu()
        found = rope_positions(
            types_of_row,
            grids(types_of_row),
            merge_size=vision.spatial_merge_size,
            tokens_per_second=getattr(vision, "tokens_per_second", 1.0),
        )
        positions[:, row, keep] = found.to(positions.device)
        deltas.append(int(found.max()) + 1 - found.shape[1])
    return positions, torch.tensor(deltas, device=input_ids.device).unsqueeze(1)


def install(model: Any) -> Any:
    """Give `model` (a `...ForConditionalGeneration` or its base) the released positions; returns it.

    Does nothing for families in which transformers already follows the released rule.
    """
    base = getattr(model, "model", model)
    if getattr(base.config, "model_type", None) in FAMILIES_TO_CORRECT:
        base.get_rope_index = types.MethodType(_get_rope_index, base)
    return model
