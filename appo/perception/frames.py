"""Frame selection: frame attention -> the crucial frames of a group (APPO steps 2 to 5).

Reads the probe's `attention`, feeds `tokens`. Pure tensor code: no model, no I/O. Every tie is settled by the
lower frame index, on every device: `torch.topk` promises no order among equals, a stable sort does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def valid_tokens(lengths: Tensor, num_tokens: int) -> Tensor:
    """The mask of real tokens, EOS included. lengths: (G,) int. Returns (G, num_tokens) bool."""
    return torch.arange(num_tokens, device=lengths.device) < lengths[:, None]


def response_frame_scores(attention: Tensor, lengths: Tensor, *, k1: int) -> Tensor:
    """Mean of each completion's k1 largest token attentions per frame (APPO section 3.2; appendix A.1).

    attention: (G, N, T) float; lengths: (G,) int in [0, N]. Fewer than k1 tokens are averaged where a
    completion is shorter; a completion without tokens scores 0 everywhere. Returns (G, T) float64, so that
    the same tokens give the same ranking however far the group is padded. Raises ValueError when k1 < 1.
    """
    if k1 < 1:
        raise ValueError(f"perception.k1={k1}: must be at least 1")
    num_tokens = attention.shape[1]
    masked = attention.double().masked_fill(~valid_tokens(lengths, num_tokens)[:, :, None], -torch.inf)
    top = masked.topk(min(k1, num_tokens), dim=1).values  # a mean does not ask which of two equals was taken
    counted = lengths.clamp(max=k1)
    kept = torch.arange(top.shape[1], device=top.device) < counted[:, None]
    return top.masked_fill(~kept[:, :, None], 0.0).sum(dim=1) / counted.clamp(min=1)[:, None]


def top_frames(scores: Tensor, *, k2: int) -> Tensor:
    """psi(i): the k2 frames with the largest score, best first, ties to the lower index (APPO section 3.2).

    scores: (G, T). Returns (G, min(k2, T)) int64. Raises ValueError when k2 < 1.
    """
    if k2 < 1:
        raise ValueError(f"perception.k2={k2}: must be at least 1")
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k2]


def split_by_reward(accuracy_rewards: Tensor, *, tau: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """S1 and S2: completions whose accuracy reward reaches tau, and those whose does not (APPO section 3.2).

    accuracy_rewards: (G,). A NaN means that nobody graded the completion: it is in neither set, as "no
    reward" is not "wrong". Returns two tuples of completion indices, ascending.
    """
    rewards = accuracy_rewards.tolist()
    right = tuple(i for i, reward in enumerate(rewards) if reward >= tau)
    wrong = tuple(i for i, reward in enumerate(rewards) if reward < tau)
    return right, wrong


def crucial_frames(
    psi: Sequence[Sequence[int]],
    right: Sequence[int],
    wrong: Sequence[int],
    *,
    strategy: str = "soft",
    fallback: str = "none",
) -> tuple[int, ...]:
    """psi', ascending: the frames that the group is judged by (APPO section 3.2; ablated in table D).

    psi: the frames of each completion. With P1, P2 the unions over `right` and `wrong`: hard = P1 - P2,
    soft = P1, all = P1 | P2. With no right completion, hard and soft are empty; fallback="all" then takes the
    frames of every completion, as the released code does. Raises ValueError for an unknown strategy or
    fallback.
    """
    if strategy not in ("hard", "soft", "all"):
        raise ValueError(f"perception.strategy={strategy!r}: must be hard, soft or all")
    if fallback not in ("none", "all"):
        raise ValueError(f"perception.fallback={fallback!r}: must be none or all")
    of_right = {frame for i in right for frame in psi[i]}
    of_wrong = {frame for i in wrong for frame in psi[i]}
    if fallback == "all" and not right:
        chosen = {frame for frames in psi for frame in frames}
    elif strategy == "hard":
        chosen = of_right - of_wrong
    elif strategy == "soft":
        chosen = of_right
    else:
        chosen = of_right | of_wrong
    return tuple(sorted(chosen))
