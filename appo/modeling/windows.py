"""A vision tower that attends to equal windows in one call, and embeds patches with a matrix product.

transformers calls attention once per window, and a Conv3d whose kernel covers its whole input. With hundreds of
small videos a step, as in the demo's warm start, the calls cost more than the arithmetic. The weights, the results
(up to rounding) and the saved model stay the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from appo.modeling.features import base_model, encoding_tower


@contextlib.contextmanager
def batched_windows(model: Any) -> Iterator[None]:
    """Within the block, the Qwen2.5-VL vision tower of `model` runs batched; other families are left alone."""
    tower = encoding_tower(model)
    changed = [tower.patch_embed, *(block.attn for block in getattr(tower, "blocks", ()))]
    nested = any("forward" in vars(module) for module in changed)
    if base_model(model).config.model_type != "qwen2_5_vl" or nested:
        yield
        return
    tower.patch_embed.forward = _linear_embedding(tower.patch_embed)
    for block in tower.blocks:
        block.attn.forward = _batched_attention(block.attn)
    try:
        yield
    finally:
        for module in changed:
            del module.forward  # the class's own is back


def _linear_embedding(embed: Any) -> Any:
    def forward(patches: Tensor) -> Tensor:
        weight = embed.proj.weight.flatten(1)
        return linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight)

    return forward


def _batched_attention(attention: Any) -> Any:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    original = attention.forward

    def forward(
        hidden_states: Tensor,
        cu_seqlens: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        lengths = cu_seqlens.diff()
        size = int(lengths[0])
        if position_embeddings is None or bool((lengths != size).any()):
            return original(hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs)
        total = len(hidden_states)
        projected = attention.qkv(hidden_states).reshape(total, 3, attention.num_heads, -1)
        query, key, value = projected.unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (query, key, value))
        seen = scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        return attention.proj(seen.transpose(1, 2).reshape(total, -1))

    return forward
