"""The selection and the policy's next-token distributions -> one weight per completion token (APPO steps 7
and 8).

Last step before the loss: the advantage of token (i, n) is multiplied by `weights[i, n]`. Two doors lead
here. `perception_weights` takes all logits and serves small cases and checks;
`perception_weights_from_hidden` takes hidden states and the head, touches only the rows that were chosen and
holds a few vocabulary entries at a time. A trainer whose groups are spread over devices calls `select`,
gathers the rows, and calls `weights_from_rows`. No gradient flows through a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from appo.perception.divergence import LogitChunk, aligned_divergence, chunk_for, normalised
from appo.perception.selection import Selection, WeightSettings, select

DEFAULT_CHUNK_MIB = 24
# Rows turned to float32 at a time where the hardware does not multiply bf16 into float32: 4 MiB at H = 2048.
_CAST_ROWS = 512


@dataclass(frozen=True, slots=True)
class PerceptionWeights:
    """The weights of one group and why they are what they are."""

    weights: Tensor  # (G, N) float32 in [1, max_weight]; 1 for padding and where no crucial frame chose
    frames: tuple[int, ...]  # psi', ascending; K of them
    right: tuple[int, ...]  # S1: completions whose accuracy reward reaches tau
    wrong: tuple[int, ...]  # S2
    psi: tuple[tuple[int, ...], ...]  # frames of each completion, best first
    divergence: Tensor  # (K, J) float64, D before normalisation; 0 where no completion has a j-th token
    normalised: Tensor  # (K, J) float64 in [0, 1]
    perception_share: float  # share of the group's tokens that at least one crucial frame chose
    degenerate: bool  # every weight is 1: the group trains as in DAPO


def perception_weights(
    attention: Any,
    completion_lengths: Any,
    accuracy_rewards: Any,
    logits: Any,
    *,
    k1: int,
    k2: int,
    k3: int,
    max_weight: float,
    tau: float = 0.5,
    strategy: str = "soft",
    fallback: str = "none",
    divergence: str = "kl",
    temperature: float = 1.0,
) -> tuple[Tensor, list[int]]:
    """APPO's token weights from full logits (APPO section 3.2, appendix A.1 and A.2).

    attention: (G, N, T), softmax weight of completion token n on frame t; completion_lengths: (G,) valid
    prefix, EOS included; accuracy_rewards: (G,); logits: (G, N, V), row n being the one that predicts token
    n, before the temperature. Tensors, arrays or nested lists. Returns the weights (G, N) and psi',
    ascending. Computed in float64. Raises ValueError for impossible settings or shapes.
    """
    settings = WeightSettings(
        k1=k1,
        k2=k2,
        k3=k3,
        max_weight=max_weight,
        tau=tau,
        strategy=strategy,
        fallback=fallback,
        divergence=divergence,
        temperature=temperature,
    )
    attention, logits = torch.as_tensor(attention), torch.as_tensor(logits)
    lengths, rewards = torch.as_tensor(completion_lengths), torch.as_tensor(accuracy_rewards)
    selection = select(attention, lengths, rewards, settings)
    result = weights_from_logits(selection, lengths, logits, settings)
    return result.weights.to(torch.promote_types(attention.dtype, torch.float32)), list(result.frames)


@torch.no_grad()
def weights_from_logits(
    selection: Selection, completion_lengths: Tensor, logits: Tensor, settings: WeightSettings
) -> PerceptionWeights:
    """The first door after `select`, with everything that `perception_weights` leaves out of its answer."""
    if logits.dim() != 3 or logits.shape[1] != selection.num_tokens:
        raise ValueError(
            f"logits: must be (completions, {selection.num_tokens}, vocabulary), is {tuple(logits.shape)}"
        )
    rows = logits.detach().flatten(0, 1)[selection.rows.to(logits.device)]

    def chunk(first: int, last: int) -> Tensor:
        return rows[:, first:last].double() / settings.temperature

    return _assemble(selection, completion_lengths, settings, chunk, rows.shape[1], 8, cast=0, chunk_mib=256)


def perception_weights_from_hidden(
    attention: Tensor,
    completion_lengths: Tensor,
    accuracy_rewards: Tensor,
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    log_normalizer: Tensor | None = None,
    chunk_mib: float = DEFAULT_CHUNK_MIB,
    **settings: Any,
) -> PerceptionWeights:
    """The same weights without the (G, N, V) tensor: logits are made for the chosen rows, chunk by chunk.

    hidden: (G, N, H) bf16 or float, the last hidden state (after the final norm) of the row that predicts
    each token; head_weight: (V, H); head_bias: (V,); log_normalizer: (G, N), log sum exp of logits /
    temperature where the caller has it already, which saves one of two passes over the vocabulary. chunk_mib
    bounds the working memory; the chosen rows, at most G * N * H numbers, come on top. settings: fields of
    `WeightSettings`.
    """
    chosen = WeightSettings(**settings)
    selection = select(attention, completion_lengths, accuracy_rewards, chosen)
    rows = selection.rows.to(hidden.device)
    return weights_from_rows(
        selection,
        completion_lengths,
        hidden.detach().flatten(0, 1)[rows],
        head_weight,
        head_bias,
        settings=chosen,
        log_normalizer=None if log_normalizer is None else log_normalizer.flatten()[rows],
        chunk_mib=chunk_mib,
    )


@torch.no_grad()
def weights_from_rows(
    selection: Selection,
    completion_lengths: Tensor,
    rows: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None = None,
    *,
    settings: WeightSettings,
    log_normalizer: Tensor | None = None,
    chunk_mib: float = DEFAULT_CHUNK_MIB,
) -> PerceptionWeights:
    """The second door after `select`: for groups whose completions lie on several devices.

    rows: (R, H), the hidden states at `selection.rows`, in that order (see `Selection.rows_of`);
    log_normalizer: (R,). The other arguments as in `perception_weights_from_hidden`. Raises ValueError when R
    disagrees.
    """
    if rows.shape[0] != selection.rows.shape[0]:
        raise ValueError(f"rows: the selection chose {selection.rows.shape[0]} rows, got {rows.shape[0]}")
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32

    def chunk(first: int, last: int) -> Tensor:
        logits = exact_logits(rows, head_weight[first:last].detach(), dtype)
        if head_bias is not None:
            logits += head_bias[first:last].to(dtype)
        return logits if settings.temperature == 1 else logits.div_(settings.temperature)

    # A copy of the head in another type; on a CPU half precision is multiplied twice (see `exact_logits`).
    cast = 0 if head_weight.dtype == rows.dtype and rows.dtype in (dtype, torch.bfloat16) else rows.shape[1]
    return _assemble(
        selection,
        completion_lengths,
        settings,
        chunk,
        head_weight.shape[0],
        torch.finfo(dtype).bits // 8,
        cast=cast,
        chunk_mib=chunk_mib,
        log_normalizer=log_normalizer,
    )


def exact_logits(rows: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """rows (R, H) @ head (C, H).T in `dtype`, float32 or float64, whatever the type of the rows. Returns (R, C).

    Half-precision rows see the head rounded to their type, as the forward pass did; their products are then exact and
    only the sum rounds. A logit rounded to bfloat16 would be off by up to 2^-8 of itself, and weights by a third.
    """
    head = head.to(rows.dtype) if rows.element_size() == 2 else head.to(dtype)
    if rows.dtype == head.dtype == dtype:
        return rows @ head.T
    if rows.is_cuda:
        return torch.mm(rows, head.T, out_dtype=dtype)
    if rows.dtype == torch.bfloat16 and _multiplies_bfloat16():
        # Faster than one product in float32: the rounded logits, then what the rounding took, in the same units that
        # sum up in float32. Off by 2^-16 of a logit.
        rounded = torch.mm(rows, head.T)
        return rounded.to(dtype).add_(torch.addmm(rounded, rows, head.T, beta=-1))
    head = head.to(dtype)
    logits = torch.empty(rows.shape[0], head.shape[0], dtype=dtype, device=rows.device)
    for part, out in zip(rows.split(_CAST_ROWS), logits.split(_CAST_ROWS), strict=True):
        torch.mm(part.to(dtype), head.T, out=out)
    return logits


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16 matrices (AMX), where a product is several times a float32 one."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _assemble(
    selection: Selection,
    lengths: Tensor,
    settings: WeightSettings,
    logits: LogitChunk,
    vocabulary: int,
    item_bytes: int,
    *,
    cast: int,
    chunk_mib: float,
    log_normalizer: Tensor | None = None,
) -> PerceptionWeights:
    """Steps 7 and 8: D of every aligned set, min-max per frame, mean over the frames that chose a token."""
    mask, slots = selection.tokens.mask, selection.slots  # (K, G, J)
    num_frames, num_completions, num_ranks = mask.shape
    exists = mask.any(dim=1)  # (K, J)
    raw = torch.zeros(num_frames, num_ranks, dtype=torch.float64, device=mask.device)
    if selection.rows.numel():
        sets = exists.nonzero(as_tuple=True)
        chunk = chunk_for(
            chunk_mib * 2**20,
            item_bytes,
            rows=selection.rows.numel(),
            cast=cast,
            sets=sets[0].numel(),
            size=num_completions,
        )
        raw[sets] = aligned_divergence(
            logits,
            vocabulary,
            slots.transpose(1, 2)[sets],
            mask.transpose(1, 2)[sets],
            kind=settings.divergence,
            log_normalizer=log_normalizer,
            chunk=chunk,
        ).to(raw.device)
    scaled = normalised(raw, exists)
    weights, chosen = _token_weights(selection, scaled, settings.max_weight)
    num_valid = int(lengths.sum())
    return PerceptionWeights(
        weights=weights.float(),
        frames=selection.frames,
        right=selection.right,
        wrong=selection.wrong,
        psi=selection.psi,
        divergence=raw,
        normalised=scaled,
        perception_share=int(chosen.sum()) / num_valid if num_valid else 0.0,
        degenerate=not bool((scaled > 0).any()) or settings.max_weight == 1,
    )


def _token_weights(selection: Selection, scaled: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """W = 1 + (max_weight - 1) * mean over the frames that chose the token. Returns W and "was chosen"."""
    mask, positions = selection.tokens.mask, selection.tokens.positions
    num_frames, num_completions, _ = mask.shape
    shape = (num_frames, num_completions, selection.num_tokens + 1)
    dense = torch.zeros(shape, dtype=torch.float64, device=mask.device)
    # One column more than tokens: ranks that do not exist are written there, and dropped.
    target = positions.masked_fill(~mask, selection.num_tokens)
    total = dense.scatter(2, target, scaled[:, None].expand(mask.shape))[..., :-1].sum(dim=0)
    count = dense.scatter(2, target, 1.0)[..., :-1].sum(dim=0)
    average = total / count.clamp(min=1)
    return 1 + (max_weight - 1) * average, count > 0
