"""Completion lengths -> the soft punishment of those that grow too long (DAPO section 3.4).

Pure tensor code. The other half of DAPO's overlong handling, leaving truncated completions out of the loss,
is TRL's `mask_truncated_completions`.
"""

from __future__ import annotations

from torch import Tensor

from appo.errors import SettingError


def soft_overlong_punishment(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """What to add to each reward (DAPO eq. 13): 0 up to max_length - buffer, falling to -1 at max_length.

    lengths: (B,) int, tokens of each completion, EOS included; buffer: tokens, 0 for no punishment at all.
    Returns (B,) float32 in [-1, 0]. Raises SettingError when the buffer is negative or longer than a
    completion.
    """
    if not 0 <= buffer <= max_length:
        raise SettingError(
            f"policy.overlong_buffer={buffer}: must be in 0 to policy.max_completion_length={max_length}"
        )
    if buffer == 0:
        return lengths.float() * 0.0
    return ((max_length - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)
