"""Aligned perception tokens -> how much the group disagrees at each (APPO step 7).

Reads the next-token distributions of the chosen rows as a stream of vocabulary chunks, so that neither a
(G, N, V) nor a (rows, V) tensor ever exists; feeds `weights`. The two doors of `weights` differ only in where
a chunk of logits comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# (first, last) of the vocabulary -> (R, last - first) logits of the chosen rows, already over the
# temperature.
LogitChunk = Callable[[int, int], Tensor]

# e^-80, times any vocabulary, is far below what a sum of float32 numbers near one can hold.
_LOWEST_LOG_PROB = -80.0
# Rounding of float32 logits by 1e-5 moves a divergence by its square. Stretching that noise to [0, 1] would
# hand out random weights where completions are word for word the same.
_CONSTANT_NATS = 1e-9
# The released code's guard against exp() overflowing in half precision.
_RELEASED_CLIP = 11.0


def log_normalizers(logits: LogitChunk, vocabulary: int, chunk: int) -> Tensor:
    """log sum exp over the vocabulary, streamed. Returns (R,) float64."""
    total: Tensor | None = None
    for first, last in _chunks(vocabulary, chunk):
        part = logits(first, last)
        # logsumexp would round its result, of the size of a logit, to float32: the same relative error for a
        # row's every probability, which does not average out.
        top = part.amax(dim=1).clamp(min=torch.finfo(part.dtype).min)
        part = part.sub_(top[:, None]).exp_().sum(dim=1).double().log() + top.double()
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None, "a vocabulary has at least one entry"
    return total


def aligned_divergence(
    logits: LogitChunk,
    vocabulary: int,
    slots: Tensor,
    mask: Tensor,
    *,
    kind: str = "kl",
    log_normalizer: Tensor | None = None,
    chunk: int,
) -> Tensor:
    """D of each aligned set of rows. A set holds at most one row of each of G completions.

    logits: the chunks of R rows; slots: (S, G) int64 into those rows; mask: (S, G) bool, whether completion i
    is in the set; log_normalizer: (R,), or None to compute it in a first pass over the vocabulary. chunk:
    vocabulary entries held at a time. Returns (S,) float64.

    kind="kl": sum_i KL(p_i || m), m the arithmetic mean over the completions in the set (A.2, eq. 1).
    kind="released": the released code instead: m is the mean of log-probabilities, the divergence is
    sum_i sum_v exp(d) - d - 1 with d = log m - log p_i clipped to +-11 and not weighted by p, and a
    completion that is not in the set takes part with the uniform distribution. Raises ValueError for another
    kind.
    """
    if kind not in ("kl", "released"):
        raise ValueError(f"perception.divergence={kind!r}: must be kl or released")
    normalizer = log_normalizers(logits, vocabulary, chunk) if log_normalizer is None else log_normalizer
    # A forbidden token has log-probability -inf, which no difference survives; these floors change no result.
    floor = _LOWEST_LOG_PROB if kind == "kl" else torch.finfo(torch.float32).min / (4 * slots.shape[1])
    total = torch.zeros(slots.shape[0], dtype=torch.float64, device=slots.device)
    for first, last in _chunks(vocabulary, chunk):
        log_probs = logits(first, last)
        coarse = normalizer.to(log_probs.dtype)
        log_probs = log_probs.sub_(coarse[:, None])
        if normalizer.dtype != log_probs.dtype:  # what float32 could not hold of it
            log_probs = log_probs.sub_((normalizer - coarse).to(log_probs.dtype)[:, None])
        log_probs = log_probs.clamp_(min=floor)
        if kind == "kl" and not log_probs.is_cuda:
            total += _kl_of_rows(log_probs, slots, mask)
            continue
        aligned = log_probs[slots.flatten()].unflatten(0, slots.shape)  # (S, G, chunk)
        total += _kl_to_mean(aligned, mask) if kind == "kl" else _released(aligned, mask, vocabulary)
    return total


def chunk_for(budget_bytes: float, item_bytes: int, *, rows: int, cast: int, sets: int, size: int) -> int:
    """Vocabulary entries to hold at a time, at least one.

    rows: R; cast: numbers per vocabulary entry that a copy of the head in another type takes; sets: S, of
    `size` G. What is held are the logits and two tensors of the rows aligned in sets with a few of their
    means, or (`_kl_of_rows`) two float64 tensors of the rows and three of the sets.
    """
    held = max(rows + 2.5 * sets * size, 5 * rows + 6 * sets)
    return max(1, int(budget_bytes / (item_bytes * (cast + held))))


def normalised(divergence: Tensor, exists: Tensor) -> Tensor:
    """Min-max over the j that exist, to [0, 1]; a constant becomes all zeros (APPO section 3.2).

    divergence: (K, J) float64; exists: (K, J) bool, whether any completion has a j-th token. Returns (K, J),
    0 where nothing exists.
    """
    low = divergence.masked_fill(~exists, torch.inf).amin(dim=1, keepdim=True)
    high = divergence.masked_fill(~exists, -torch.inf).amax(dim=1, keepdim=True)
    spread = high - low
    constant = ~(spread > _CONSTANT_NATS)
    scaled = (divergence - low) / spread.masked_fill(constant, 1.0)
    return scaled.masked_fill(constant | ~exists, 0.0).clamp(0.0, 1.0)


def _kl_to_mean(log_probs: Tensor, mask: Tensor) -> Tensor:
    """This chunk's part of sum_i KL(p_i || m). log_probs: (S, G, C), overwritten; mask: (S, G). Returns (S,).

    With d = log p - log m, the textbook sum of p d cancels: its terms are of first order in d, the result of
    second. As p and m both sum to one, m (d e^d - (e^d - 1)) summed over the vocabulary is the same number,
    and each of its terms is positive and of second order. It also forgives an error of the normaliser to
    first order.
    """
    # A product, not a masked fill: half the time, and the floor keeps every factor finite.
    present = mask[:, :, None].to(log_probs.dtype)
    probs = log_probs.exp().mul_(present)
    mean = probs.sum(dim=1) / mask.sum(dim=1, keepdim=True)  # (S, C)
    ratio = log_probs.sub_(mean.log()[:, None])
    growth = torch.expm1(ratio, out=probs)
    terms = ratio.addcmul_(ratio, growth).sub_(growth).mul_(present)  # d e^d - expm1(d)
    return terms.sum(dim=1).mul_(mean).sum(dim=1)


def _kl_of_rows(log_probs: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
    """`_kl_to_mean` from the distinct rows: log_probs (R, C), overwritten where it is float64; slots, mask
    (S, G).

    A row is in a set for each frame that chose its token, so taking exponentials before rows are brought
    together saves most of them; on two cores this halves the time. sum_i p_i d_i cancels as said above, which
    float64 can afford: its rounding is 1e-16 of the entropy. Many GPUs compute float64 at a sixty-fourth of
    the speed.
    """
    present = mask.double()
    log_probs = log_probs.double()
    probs = log_probs.exp()
    total = embedding_bag(slots, probs, mode="sum", per_sample_weights=present)  # (S, C), sum_i p_i
    own = embedding_bag(slots, log_probs.mul_(probs), mode="sum", per_sample_weights=present)
    mean = total / present.sum(dim=1, keepdim=True)
    return own.sub_(total.mul_(mean.log_())).sum(dim=1)


def _released(log_probs: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """This chunk's part of the released code's divergence. Shapes as in `_kl_to_mean`."""
    log_probs.masked_fill_(~mask[:, :, None], -math.log(vocabulary))
    mean = log_probs.mean(dim=1, keepdim=True)
    difference = log_probs.neg_().add_(mean).clamp_(-_RELEASED_CLIP, _RELEASED_CLIP)
    return torch.expm1(difference).sub_(difference).sum(dim=(1, 2))


def _chunks(vocabulary: int, chunk: int) -> Iterator[tuple[int, int]]:
    for first in range(0, vocabulary, chunk):
        yield first, min(first + chunk, vocabulary)
