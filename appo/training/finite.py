"""Numbers that are no longer finite end a training at once, on all of its processes, before they reach a checkpoint.

A step that trains on NaN leaves weights of NaN, and a logged loss that hides it: transformers leaves such losses out of
its averages. So every phase of a step asks here, and the error says which step, which phase and which prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.errors import UserError

NAMED = 8  # prompts; a whole batch of them would fill the screen


class NotFinite(UserError, RuntimeError):
    """A training met NaN or infinity: step, phase, prompts, and where it can go on from."""


class BrokenDistribution(NotFinite):
    """The model gave no distribution to draw from: its logits are not finite. sample_ids: of which prompts."""

    def __init__(self, sample_ids: Sequence[str]):
        super().__init__(
            f"sample {_named(sample_ids)}: the model's logits are not finite; its weights are broken"
        )
        self.sample_ids = list(sample_ids)


def stop_unless_finite(trainer: Any, phase: str, what: str, broken: Sequence[str]) -> None:
    """Raise NotFinite on all processes where any of them has broken numbers. Collective.

    what: is not finite. broken: ids of the samples on this process whose numbers are; none where all is well.
    """
    if not on_any_process(bool(broken), trainer.accelerator.device):
        return
    from accelerate.utils import gather_object

    everyone = sorted(set(gather_object(list(broken))))
    raise NotFinite(
        f"step {trainer.state.global_step + 1}, {phase}: {what} not finite; prompts: {_named(everyone)}\n"
        f"{_last_checkpoint(Path(trainer.args.output_dir))}; where it happens again, lower training.learning_rate or "
        "leave these prompts out"
    )


def broken_rows(values: Tensor) -> list[int]:
    """Rows of (B, ...) that hold a NaN or an infinity."""
    good = values.detach().isfinite().flatten(1).all(dim=1)
    return (~good).nonzero().flatten().tolist()


def on_any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on one process at least. Collective where there are several."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    found = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found)


def _named(sample_ids: Sequence[str]) -> str:
    more = len(sample_ids) - NAMED
    return ", ".join(sample_ids[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _last_checkpoint(folder: Path) -> str:
    from appo.training.checkpoints import MARKER

    whole = [int(path.parent.name.rsplit("-", 1)[1]) for path in folder.glob(f"checkpoint-*/{MARKER}")]
    if not whole:
        return "no checkpoint was written before; run again to start anew"
    return f"{folder / f'checkpoint-{max(whole)}'} is as it was; run again to go on from there"
