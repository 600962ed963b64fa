"""Rewards of the rollouts -> the advantage of each token, which the loss multiplies its ratio by.

Pure tensor code. B completions lie in order of their groups, G = `num_generations` to a group. A NaN reward
means that there is none: it takes no part in its group's mean and deviation, and its own advantage is 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from appo.policy.base import OVERLONG, RewardStream

# TRL's guard against a deviation of zero (GRPOTrainer, scale_rewards="group").
_DEVIATION_FLOOR = 1e-4


def stream_rewards(rewards: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum of some reward functions. rewards: name -> (B,). Returns (B,).

    A function that gave no reward (NaN) is left out of the sum, as in TRL; where none gave any, the sum is
    NaN; a punishment of its length alone does not make it rewarded. Raises KeyError naming a reward function
    that was not computed.
    """
    if missing := sorted(set(weights) - set(rewards)):
        raise KeyError(f"reward {missing[0]!r}: was not computed; there are {', '.join(sorted(rewards))}")
    values = torch.stack([rewards[name] for name in weights])  # (rewards, B)
    scale = torch.tensor(list(weights.values()), dtype=values.dtype, device=values.device)
    total = (values * scale[:, None]).nansum(dim=0)
    graded = torch.stack(
        [~rewards[name].isnan() for name in weights if name != OVERLONG] or [~values[0].isnan()]
    )
    return total.masked_fill(~graded.any(dim=0), torch.nan)


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """(r - mean) / (std + 1e-4) within each group, std unbiased (GRPO section 4.1; TRL's
    `scale_rewards="group"`).

    rewards: (B,) float, NaN where there is none. Returns (B,); 0 for a NaN, and for a group whose rewards are
    all equal exactly 0: rounding of their mean, divided by 1e-4, would be a gradient. Raises ValueError when
    B is not a multiple of `num_generations`.
    """
    grouped = _grouped(rewards, num_generations)
    known = ~grouped.isnan()
    count = known.sum(dim=1, keepdim=True)
    mean = grouped.nansum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = (grouped - mean).masked_fill(~known, 0.0)
    deviation = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    advantages = centred / (deviation + _DEVIATION_FLOOR)
    return advantages.masked_fill(~_differ(grouped)[:, None], 0.0).flatten()


def informative_groups(rewards: Tensor, num_generations: int) -> Tensor:
    """Which groups teach something: those with at least two different rewards (DAPO eq. 11, dynamic
    sampling).

    rewards: (B,), NaN where there is none. Returns (B / G,) bool; a trainer draws again for the others.
    """
    return _differ(_grouped(rewards, num_generations))


def token_advantages(
    streams: Sequence[RewardStream],
    rewards: Mapping[str, Tensor],
    num_generations: int,
    num_tokens: int,
    *,
    spans: Mapping[str, Tensor] | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Advantage of every completion token: its stream's, times its perception weight where there are any.

    rewards: name -> (B,); num_tokens: N; spans: tag -> (B, N) bool (see `spans.tag_masks`), needed when a
    stream names tags; weights: (B, N), APPO's. Returns (B, N). A token in no named span takes the stream
    without tags; a token in two takes the first stream's. With weights of one the result is that without
    weights, exactly. Raises ValueError when spans are missing.
    """
    if weights is not None and weights.isnan().any():
        raise ValueError("weights: have NaN; every token needs a weight, 1 where nothing is known")
    total = next(iter(rewards.values()))
    advantages = total.new_zeros(total.shape[0], num_tokens)
    taken = torch.zeros_like(advantages, dtype=torch.bool)
    # Those with tags choose first; what they leave belongs to the one without.
    for stream in sorted(streams, key=lambda stream: not stream.tags):
        values = group_advantages(stream_rewards(rewards, stream.rewards), num_generations)
        own = ~taken & _tokens_of(stream, spans, taken)
        advantages = torch.where(own, values[:, None], advantages)
        taken |= own
    return advantages if weights is None else advantages * weights


def _tokens_of(stream: RewardStream, spans: Mapping[str, Tensor] | None, like: Tensor) -> Tensor:
    """(B, N) bool: the tokens that a stream names; all of them where it names no tag."""
    if not stream.tags:
        return torch.ones_like(like)
    if spans is None or not set(stream.tags) <= set(spans):
        raise ValueError(f"spans: the {stream.name} advantage needs those of {', '.join(stream.tags)}")
    return torch.stack([spans[tag] for tag in stream.tags]).any(dim=0)


def _grouped(rewards: Tensor, num_generations: int) -> Tensor:
    if rewards.dim() != 1 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards: must be one per completion in groups of {num_generations}, is {tuple(rewards.shape)}"
        )
    return rewards.view(-1, num_generations)


def _differ(grouped: Tensor) -> Tensor:
    """(P,) bool: the group has at least two rewards that are known and not equal."""
    known = ~grouped.isnan()
    low = grouped.masked_fill(~known, torch.inf).amin(dim=1)
    high = grouped.masked_fill(~known, -torch.inf).amax(dim=1)
    return high > low
