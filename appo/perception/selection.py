"""A group's attention, lengths and rewards -> which rows the token weights need (APPO steps 2 to 6 together).

Stands between the probe and the head: its result is small, equal on every device that is given the same
gathered attention, and names the rows of hidden states to bring together. `weights` turns those rows into
weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from appo.errors import Diverged, SettingError
from appo.perception.frames import (
    crucial_frames,
    response_frame_scores,
    split_by_reward,
    top_frames,
    valid_tokens,
)
from appo.perception.tokens import PerceptionTokens, perception_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSettings:
    """APPO's settings with the paper's defaults (K1, K2, K3, tau, alpha); `temperature` is the rollouts'.

    Raises SettingError naming the recipe's key, the value and the remedy.
    """

    k1: int = 15
    k2: int = 3
    k3: int = 64
    max_weight: float = 1.7
    tau: float = 0.5
    strategy: str = "soft"
    fallback: str = "none"
    divergence: str = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("k1", "k2", "k3"):
            if getattr(self, name) < 1:
                raise SettingError(f"perception.{name}={getattr(self, name)}: must be at least 1")
        if not self.max_weight >= 1:
            raise SettingError(
                f"perception.max_weight={self.max_weight}: must be at least 1 (1 is plain DAPO)"
            )
        if not self.temperature > 0:
            raise SettingError(f"policy.temperature={self.temperature}: must be above 0")
        choices = {
            "strategy": ("hard", "soft", "all"),
            "fallback": ("none", "all"),
            "divergence": ("kl", "released"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SettingError(
                    f"perception.{name}={getattr(self, name)!r}: must be one of {', '.join(allowed)}"
                )


@dataclass(frozen=True, slots=True)
class Selection:
    """What steps 2 to 6 chose in one group of G completions, padded to N tokens.

    A row is one completion token, numbered i * N + n: the query row that *predicts* token n of completion i.
    """

    frames: tuple[int, ...]  # psi', ascending; K of them
    psi: tuple[tuple[int, ...], ...]  # frames of each completion, best first
    right: tuple[int, ...]  # S1
    wrong: tuple[int, ...]  # S2
    tokens: PerceptionTokens  # positions and mask, (K, G, J)
    rows: Tensor  # (R,) int64, ascending, each once
    slots: Tensor  # (K, G, J) int64: where in `rows`; 0 where the mask is false
    num_tokens: int  # N

    def rows_of(self, completion: int) -> Tensor:
        """The chosen token positions of one completion, ascending: what the device that holds it contributes.

        Concatenated over the completions in order, the hidden states at these positions are the rows that
        `weights_from_rows` asks for.
        """
        own = self.rows.div(self.num_tokens, rounding_mode="floor") == completion
        return self.rows[own] - completion * self.num_tokens


def select(
    attention: Tensor, completion_lengths: Tensor, accuracy_rewards: Tensor, settings: WeightSettings
) -> Selection:
    """Choose crucial frames and perception tokens of one group.

    attention: (G, N, T) float, as the probe gives it; completion_lengths: (G,) int, valid prefix with EOS;
    accuracy_rewards: (G,) float, NaN where there is none. What stands in the padding is never read, not even
    NaN. Raises ValueError when shapes disagree, a length is outside [0, N] or a valid attention is not
    finite (Diverged).
    """
    num_completions, num_tokens, _ = _checked_shape(attention, completion_lengths, accuracy_rewards)
    attention = attention.detach()
    lengths = completion_lengths.to(device=attention.device, dtype=torch.int64)
    valid = valid_tokens(lengths, num_tokens)
    if not bool(attention.isfinite().logical_or(~valid[:, :, None]).all()):
        raise Diverged(
            "attention: has NaN or infinity on a completion token, so the model has diverged; lower "
            "training.learning_rate, and go on from a checkpoint before that"
        )

    scores = response_frame_scores(attention, lengths, k1=settings.k1)
    best = top_frames(scores, k2=settings.k2).tolist()
    # A completion without tokens has looked at nothing.
    psi = [tuple(frames) if length else () for frames, length in zip(best, lengths.tolist(), strict=True)]
    right, wrong = split_by_reward(accuracy_rewards, tau=settings.tau)
    frames = crucial_frames(psi, right, wrong, strategy=settings.strategy, fallback=settings.fallback)
    tokens = perception_tokens(attention, lengths, frames, k3=settings.k3)

    offsets = torch.arange(num_completions, device=attention.device)[:, None] * num_tokens
    flat = tokens.positions + offsets  # (K, G, J)
    chosen = torch.zeros(num_completions * num_tokens, dtype=torch.bool, device=attention.device)
    chosen[flat[tokens.mask]] = True
    slot_of = (chosen.cumsum(0) - 1).clamp(min=0)
    return Selection(
        frames=frames,
        psi=tuple(psi),
        right=right,
        wrong=wrong,
        tokens=tokens,
        rows=chosen.nonzero()[:, 0],
        slots=slot_of[flat].masked_fill(~tokens.mask, 0),
        num_tokens=num_tokens,
    )


def _checked_shape(attention: Tensor, lengths: Tensor, rewards: Tensor) -> tuple[int, int, int]:
    if attention.dim() != 3:
        raise ValueError(f"attention: must be (completions, tokens, frames), is {tuple(attention.shape)}")
    num_completions, num_tokens, num_frames = attention.shape
    for name, tensor in (("completion_lengths", lengths), ("accuracy_rewards", rewards)):
        if tensor.shape != (num_completions,):
            raise ValueError(
                f"{name}: must be ({num_completions},), one per completion, is {tuple(tensor.shape)}"
            )
    if bool(((lengths < 0) | (lengths > num_tokens)).any()):
        raise ValueError(f"completion_lengths={lengths.tolist()}: must be between 0 and {num_tokens}")
    return num_completions, num_tokens, num_frames
