"""Completions -> log-probabilities, entropies and, when asked, frame attention with the hidden states behind it.

One forward pass for all of these, used for the scoring pass and for the update alike. With a shared prefix every
group is packed so that its prompt and video run once (`appo.modeling.packing`); without, each completion carries its
own copy, as TRL does. Both give the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.modeling.attention import check_implementation
from appo.modeling.inputs import PromptInputs, vision_kwargs
from appo.modeling.packing import PackedGroup, pack
from appo.perception.probe import FrameProbe, PlainRows
from appo.training.layouts import head_at_hand


@dataclass(frozen=True, slots=True)
class Row:
    """One completion of a batch. group: equal for completions of one prompt. tokens: (n,) long, n >= 1."""

    prompt: PromptInputs
    group: int
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """logps, entropy: (B, N), zero past a completion's end; logps carry the gradient. TRL fuses the reference model's
    head without entropy: None there.

    attention: (B, N, T) float32 and hidden: (B, N, H), of the row that predicts each token, without gradient; None
    unless a probe was asked for. T is the most frames of any prompt, 0 where none has a video. hidden is in the type
    that the head computed in: under autocast the residual stream stays float32 and the head rounds it first.
    """

    logps: Tensor
    entropy: Tensor | None
    attention: Tensor | None = None
    hidden: Tensor | None = None


def score(
    model: Any,
    rows: Sequence[Row],
    num_tokens: int,
    *,
    shared_prefix: bool,
    pad_token_id: int,
    device: torch.device,
    probe_layers: tuple[int, ...] | None = None,
    probe_chunk_mib: int = 64,
) -> Scores:
    """Score completions under `model`, whose head was fused by TRL's `add_fused_lm_head`.

    num_tokens: N to pad to. probe_layers: decoder layers whose frame attention is read; None reads nothing. Raises
    UnsupportedModel when one of the two is asked of another attention function than appo's.
    """
    if shared_prefix or probe_layers is not None:
        check_implementation(model)
    num_frames = max((row.prompt.num_frames for row in rows), default=0)
    probe = None
    if probe_layers is not None:
        probe = FrameProbe(probe_layers, num_frames, probe_chunk_mib)
    run = _packed if shared_prefix else _padded
    with head_at_hand(model):
        found = run(model, rows, num_tokens, pad_token_id, device, probe)
    if probe is not None:
        probe.close()
    return found


def log_normalizers(
    hidden: Tensor,
    tokens: Tensor,
    logps: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    temperature: float,
) -> Tensor | None:
    """log sum exp of logits / temperature, from the log-probability of the one token that is known anyway.

    hidden: (..., H) of the rows that predict `tokens` (...), whose log-probabilities are `logps` (...). One product a
    row instead of a pass over the vocabulary. None where the head computed below float32, which the type of `hidden`
    says (see `Scores`): there the forward pass rounds its logits, and the sum would be of others than the token weights
    are made from.
    """
    if hidden.dtype not in (torch.float32, torch.float64) or head_weight.dtype != hidden.dtype:
        return None
    logits = (hidden * head_weight[tokens]).sum(dim=-1)
    if head_bias is not None:
        logits = logits + head_bias[tokens]
    return logits / temperature - logps


def _packed(
    model: Any,
    rows: Sequence[Row],
    num_tokens: int,
    pad_token_id: int,
    device: torch.device,
    probe: FrameProbe | None,
) -> Scores:
    del pad_token_id  # nothing is padded
    members: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        members.setdefault(row.group, []).append(place)
    groups, prompts = [], []
    for places in members.values():
        prompt = rows[places[0]].prompt
        prompts.append(prompt)
        completions = tuple(rows[place].tokens for place in places)
        groups.append(
            PackedGroup(prompt.ids, prompt.positions, prompt.frame_of_token, completions, tuple(places))
        )
    packed = pack(groups, device)
    extra = {} if probe is None else {"frame_probe": probe}
    output = model(
        **packed.model_inputs(),
        **_without_seconds(vision_kwargs(prompts, model, device)),
        scored=packed.scored,
        shift_labels=packed.labels,
        fused_lm_head=True,
        **extra,
    )
    logps, entropy = (
        None if x is None else packed.unpack(x, len(rows), num_tokens)
        for x in (output.log_probs, output.entropy)
    )
    if probe is None:
        return Scores(logps, entropy)
    attention = torch.zeros(len(rows), num_tokens, probe.num_frames, device=device)
    for part, bucket in enumerate(packed.buckets):
        read = probe.attention(part)
        attention[bucket.rows.flatten(), : read.shape[1]] = read
    return Scores(logps, entropy, attention, packed.unpack(_as_computed(probe.hidden), len(rows), num_tokens))


def _padded(
    model: Any,
    rows: Sequence[Row],
    num_tokens: int,
    pad_token_id: int,
    device: torch.device,
    probe: FrameProbe | None,
) -> Scores:
    width = max(len(row.prompt.ids) for row in rows)
    batch, length = len(rows), width + num_tokens
    ids = torch.full((batch, length), pad_token_id)
    mask, frames = torch.zeros(batch, length, dtype=torch.long), torch.full((batch, length), -1)
    positions = torch.zeros(3, batch, length, dtype=torch.long)
    labels = torch.full((batch, num_tokens), -100)
    for place, row in enumerate(rows):
        start, end = width - len(row.prompt.ids), width + len(row.tokens)
        ids[place, start:width], ids[place, width:end] = row.prompt.ids, row.tokens
        mask[place, start:end] = 1
        frames[place, start:width] = row.prompt.frame_of_token
        following = int(row.prompt.positions.max()) + 1
        positions[:, place, start:width] = row.prompt.positions
        positions[:, place, width:] = torch.arange(following, following + num_tokens)
        labels[place, : len(row.tokens)] = row.tokens
    scored = torch.arange(width - 1, length - 1).expand(batch, -1).to(device)
    extra = {}
    if probe is not None:
        probe.plain = PlainRows(scored, mask.bool().to(device), frames.to(device))
        extra = {"frame_probe": probe}
    output = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        **_without_seconds(vision_kwargs([row.prompt for row in rows], model, device)),
        scored=scored,
        shift_labels=labels.to(device),
        fused_lm_head=True,
        **extra,
    )
    if probe is None:
        return Scores(output.log_probs, output.entropy)
    return Scores(output.log_probs, output.entropy, probe.attention(), _as_computed(probe.hidden))


def _as_computed(hidden: Tensor | None) -> Tensor:
    """Hidden states in the type of the product with the head that is about to be or was made of them."""
    assert hidden is not None, "a probed pass leaves its hidden states"
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def _without_seconds(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positions are given, so nothing is left for the model to make from seconds."""
    return {name: value for name, value in kwargs.items() if name != "second_per_grid_ts"}
