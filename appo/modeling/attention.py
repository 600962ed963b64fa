"""The attention function the policy runs: SDPA, plus shared prefixes and the frame probe when asked for.

transformers lets a program register its own attention function and hands a model's keyword arguments down to it. So
`model(..., packed=..., frame_probe=...)` reaches this function without a global or a patched layer, also when
gradient checkpointing runs a layer again. Without those arguments it is transformers' SDPA to the letter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from appo.errors import UserError
from appo.modeling.checkpoints import SUPPORTED_FAMILIES
from appo.modeling.features import base_model
from appo.modeling.packing import Bucket, Packed
from appo.perception.probe import FrameProbe

NAME = "appo"


class UnsupportedModel(UserError, ValueError):
    """A model whose attention this module cannot stand in for."""


def register() -> str:
    """Make the function known to transformers under NAME; safe to call again. Returns NAME."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, appo_attention)
    # Without a mask function of the same name every mask, padding included, would be dropped in silence.
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def check_supported(config: Any) -> None:
    """Raise UnsupportedModel, by name, for an architecture whose attention was not checked against eager."""
    if config.model_type not in SUPPORTED_FAMILIES:
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: frame attention and shared prefixes are checked for "
            f"{', '.join(SUPPORTED_FAMILIES)}; choose a checkpoint of one of these as model.path"
        )


def check_implementation(model: Any) -> None:
    """Raise UnsupportedModel, by name, where the text layers run another attention function than this module's.

    transformers' own (flash_attention_2, sdpa, eager, ...) take no notice of `packed`: every token would see all tokens
    before it, other prompts' and completions' too.
    """
    found = base_model(model).language_model.config._attn_implementation
    if found != NAME:
        raise UnsupportedModel(
            f"attn_implementation={found!r}: knows no shared prefix and no frame probe; load the model with "
            f"appo.modeling.loading.load_policy, whose {NAME!r} runs on SDPA's kernels, FlashAttention among them"
        )


def appo_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: Packed | None = None,
    frame_probe: FrameProbe | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (B, heads, L, D); key, value: (B, kv_heads, L, D). Returns ((B, L, heads, D), None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = getattr(module, "layer_idx", None)
    # Vision blocks have no layer_idx; they see neither packing nor the probe.
    if layer is not None and packed is not None:
        return packed_attention(layer, query, key, value, packed, scaling, sliding_window, frame_probe), None
    if layer is not None and query.shape[2] == 1 and frame_probe is None and not dropout:
        return _one_token(query, key, value, attention_mask, scaling), None
    output, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )
    if layer is not None and frame_probe is not None and frame_probe.wants(layer):
        _probe_plain(layer, query, key, scaling, sliding_window, frame_probe)
    return output, None


def _one_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Decoding: query heads that share keys are rows of one product; (B, heads, 1, D) -> (B, 1, heads, D).

    Repeated for every query head, as transformers does under a mask, one layer's keys and values would for a moment be
    seven times their size in a 7B model.
    """
    batch, heads, _, width = query.shape
    folded = query.reshape(batch, key.shape[1], -1, width)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(batch, 1, heads, width)


def packed_attention(
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: Packed,
    scaling: float | None,
    sliding_window: int | None = None,
    probe: FrameProbe | None = None,
) -> Tensor:
    """Each prompt attends to itself once; each completion to its prompt and to itself. Returns (1, L, heads, D)."""
    pieces = []
    for part, bucket in enumerate(packed.buckets):
        prefix_q, prefix_k, prefix_v = (_take(x, bucket.prefix) for x in (query, key, value))
        mask = _window_mask(prefix_q.shape[2], 0, sliding_window, query.device)
        prefix_out = _attend(prefix_q, prefix_k, prefix_v, scaling, mask)
        segment_q = _take_segments(query, bucket)
        segment_k, segment_v = (
            torch.cat([_per_completion(x, bucket), _take_segments(own, bucket)], dim=2)
            for x, own in ((prefix_k, key), (prefix_v, value))
        )
        mask = _window_mask(segment_q.shape[2], prefix_k.shape[2], sliding_window, query.device)
        segment_out = _attend(segment_q, segment_k, segment_v, scaling, mask)
        pieces += [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (prefix_out, segment_out)]
        if probe is not None and probe.wants(layer):
            own = bucket.segments.new_full((1, segment_q.shape[2]), -1)
            frames = bucket.frame_of_prefix.repeat_interleave(bucket.segments.shape[1], dim=0)
            frames = torch.cat([frames, own.expand(len(frames), -1)], dim=1)
            seen = _lower_right(segment_q.shape[2], prefix_k.shape[2], query.device) if mask is None else mask
            probe.read(layer, part, segment_q, segment_k, seen, frames, _scale(scaling, query))
    return torch.cat(pieces).index_select(0, packed.inverse).unsqueeze(0)


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: Tensor | None) -> Tensor:
    """Causal attention aligned at the lower right: the last query sees every key."""
    grouped = key.shape[1] != query.shape[1]
    if mask is None and query.shape[2] == key.shape[2]:
        return scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    if mask is None and query.is_cuda:
        return attend_lower_right(query, key, value, scaling)
    if mask is None:
        mask = _lower_right(query.shape[2], key.shape[2] - query.shape[2], query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)


def attend_lower_right(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Of fewer queries than keys, by the kernels that need no mask for it; a GPU's way.

    Flash and memory-efficient kernels know this bias; a boolean mask would rule the first of them out. The bias looks at
    its arguments before autocast does: rotary positions leave float32 queries and keys beside bfloat16 values there.
    """
    from torch.nn.attention.bias import causal_lower_right

    if torch.is_autocast_enabled(query.device.type):
        computed = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(computed) for x in (query, key, value))
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    bias = causal_lower_right(query.shape[2], key.shape[2])
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)


def _lower_right(length: int, before: int, device: torch.device) -> Tensor:
    return torch.ones(length, before + length, dtype=torch.bool, device=device).tril(before)


def _window_mask(length: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """(length, before + length) bool of a sliding window, or None where the window hides nothing."""
    if window is None or before + length <= window:
        return None
    return _lower_right(length, before, device).triu(before - window + 1)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """(1, H, L, D) at index (B, P) -> (B, H, P, D)."""
    return x[0][:, index].transpose(0, 1)


def _take_segments(x: Tensor, bucket: Bucket) -> Tensor:
    """(1, H, L, D) -> (B * G, H, S, D)."""
    return _take(x, bucket.segments.flatten(0, 1))


def _per_completion(prefix: Tensor, bucket: Bucket) -> Tensor:
    """(B, H, P, D) -> (B * G, H, P, D)."""
    size = bucket.segments.shape[1]
    return prefix.unsqueeze(1).expand(-1, size, -1, -1, -1).flatten(0, 1)


def _scale(scaling: float | None, query: Tensor) -> float:
    return query.shape[-1] ** -0.5 if scaling is None else scaling


# Without this, gradient checkpointing saves what the recomputation, which reads nothing, does not.
@torch.no_grad()
def _probe_plain(
    layer: int, query: Tensor, key: Tensor, scaling: float | None, window: int | None, probe: FrameProbe
) -> None:
    if probe.plain is None:
        raise RuntimeError("frame probe: armed for an unpacked batch without saying which rows to read")
    rows, places = probe.plain.rows, torch.arange(key.shape[2], device=key.device)
    chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    seen = (places <= rows.unsqueeze(-1)) & probe.plain.key_valid.unsqueeze(1)
    if window is not None:
        seen &= places > rows.unsqueeze(-1) - window
    probe.read(layer, 0, chosen, key, seen, probe.plain.frame_of_key, _scale(scaling, query))
