"""Which prompts each step sees: TRL's RepeatSampler with an order that depends on the epoch, not on history."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trl.trainer.utils import RepeatSampler


class EpochRepeatSampler(RepeatSampler):
    """The permutation of epoch e is drawn with seed + e, so that a run resumed in epoch e sees the same prompts.

    TRL's generator moves on with every epoch that was iterated; a resumed process has iterated none.
    """

    def __init__(self, *args: Any, seed: int = 0, **kwargs: Any):
        super().__init__(*args, seed=seed, **kwargs)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self._epoch)
        return super().__iter__()
