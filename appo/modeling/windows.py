"""A vision tower that attends to equal windows in one call, and embeds patches with a matrix product.

transformers calls attention once per window, and a Conv3d whose kernel covers its whole input. With hundreds of
windows a video the calls cost more than the arithmetic. The weights, the saved model and, up to rounding, results
and gradients stay the same, so every pass runs like this: features computed beforehand, and a tower that trains.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from appo.modeling.features import base_model


def install(model: Any) -> Any:
    """Let the Qwen2.5-VL vision tower of `model` run batched; other families are left alone. Returns `model`.

    For good and not for a block of code: a checkpointed layer runs again in the backward pass, and must run the same.
    """
    base = base_model(model)
    if base.config.model_type == "qwen2_5_vl":
        # Bound methods: the tower is one object, whoever names it.
        base.visual.patch_embed.forward = MethodType(_linear_embedding, base.visual.patch_embed)
        for block in base.visual.blocks:
            block.attn.forward = MethodType(_batched_attention, block.attn)
    return model


def _linear_embedding(self: Any, patches: Tensor) -> Tensor:
    weight = self.proj.weight
    if weight.dim() != 5 or hasattr(
        weight, "full_tensor"
    ):  # ZeRO-3 brings the parts together when `proj` is called
        return type(self).forward(self, patches)
    flat = weight.flatten(1)
    return linear(patches.view(-1, flat.shape[1]).to(flat.dtype), flat)


def _batched_attention(
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    lengths = cu_seqlens.diff()
    size = int(lengths[0])
    if position_embeddings is None or bool((lengths != size).any()):
        return type(self).forward(
            self, hidden_states, cu_seqlens, position_embeddings=position_embeddings, **kwargs
        )
    total = len(hidden_states)
    projected = self.qkv(hidden_states).reshape(total, 3, self.num_heads, -1)
    query, key, value = projected.unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    query, key, value = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (query, key, value))
    seen = scaled_dot_product_attention(query, key, value, scale=self.scaling)
    return self.proj(seen.transpose(1, 2).reshape(total, -1))
