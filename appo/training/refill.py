"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so other prompts take their places.

TRL has no such thing. After a generation batch is scored, the degenerate groups of every process are replaced by
groups of freshly drawn prompts, round after round up to a cap; what is still degenerate then stays, with advantage 0.
Every process draws as many prompts as the neediest one, because TRL gathers rewards over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appo.policy.advantages import informative_groups, stream_rewards
from appo.training.rollouts import Rollouts
from appo.training.sampling import stream_seed

DRAW = -2  # tells the stream of prompt draws from those of completions


def refill(trainer: Any, output: dict[str, Any]) -> dict[str, Any]:
    """Replace degenerate groups of `output` (and of `trainer.rollouts`) until none is left or the cap is reached."""
    settings, size = trainer.settings, trainer.num_generations
    device = output["advantages"].device
    rounds, drawn = 0, 0
    for number in range(1, settings.dynamic_sampling_max_rounds + 1):
        places = _degenerate(trainer)
        needed = torch.tensor([len(places)], device=device)
        most = int(trainer.accelerator.gather(needed).max())
        if most == 0:
            break
        rounds, drawn = number, drawn + most
        kept, kept_rollouts = output, trainer.rollouts
        trainer._round = number
        fresh = trainer.draw(_rows_drawn(trainer, most, number))
        usable = [g for g in range(most) if g not in set(_degenerate(trainer))]
        swap = dict(
            zip(places, usable, strict=False)
        )  # place -> fresh group; whichever runs out first ends it
        output, trainer.rollouts = _swapped(trainer, kept, kept_rollouts, fresh, trainer.rollouts, swap, size)
    left = torch.tensor([len(_degenerate(trainer))], device=device, dtype=torch.float)
    metrics = trainer._metrics["train"]
    metrics["dynamic_sampling/rounds"].append(float(rounds))
    metrics["dynamic_sampling/prompts_drawn"].append(float(drawn))
    metrics["dynamic_sampling/groups_left"].append(float(trainer.accelerator.gather(left).sum()))
    return output


def _degenerate(trainer: Any) -> list[int]:
    """Local groups, by place, that no stream of rewards tells apart."""
    rollouts, size = trainer.rollouts, trainer.num_generations
    informative = torch.stack(
        [
            informative_groups(stream_rewards(rollouts.rewards, stream.rewards), size)
            for stream in trainer.settings.streams
        ]
    ).any(dim=0)
    return [place for place, good in enumerate(informative.tolist()) if not good]


def _rows_drawn(trainer: Any, count: int, number: int) -> list[dict[str, Any]]:
    """`count` prompts for this process, other ones for every other process and round; G rows each."""
    accelerator, dataset = trainer.accelerator, trainer.train_dataset
    generator = torch.Generator().manual_seed(
        stream_seed(trainer.args.seed, DRAW, trainer.state.global_step, number)
    )
    order = torch.randperm(len(dataset), generator=generator).tolist()
    first = accelerator.process_index * count
    chosen = [order[(first + i) % len(order)] for i in range(count)]
    return [dataset[index] for index in chosen for _ in range(trainer.num_generations)]


def _swapped(
    trainer: Any,
    kept: dict[str, Any],
    kept_rollouts: Rollouts,
    fresh: dict[str, Any],
    fresh_rollouts: Rollouts,
    swap: dict[int, int],
    size: int,
) -> tuple[dict[str, Any], Rollouts]:
    count = len(kept_rollouts.prompts)
    # Rows numbered over both batches, the fresh one's after the kept one's.
    rows = [
        count + swap[row // size] * size + row % size if row // size in swap else row for row in range(count)
    ]
    output = {
        name: _joined(name, value, fresh[name], trainer._tokenizer.pad_token_id)[rows]
        if isinstance(value, Tensor) and value.dim() > 0
        else value
        for name, value in kept.items()
    }
    mask = output["completion_mask"]
    output["num_items_in_batch"] = trainer.accelerator.gather(mask.sum()).sum()
    both = Rollouts(
        prompts=kept_rollouts.prompts + fresh_rollouts.prompts,
        groups=kept_rollouts.groups + fresh_rollouts.groups,
        seeds=kept_rollouts.seeds + fresh_rollouts.seeds,
        lengths=kept_rollouts.lengths + fresh_rollouts.lengths,
        tokens=kept_rollouts.tokens + fresh_rollouts.tokens,
        texts=kept_rollouts.texts + fresh_rollouts.texts,
        rewards={
            name: torch.cat([values, fresh_rollouts.rewards[name]])
            for name, values in kept_rollouts.rewards.items()
        },
        read=kept_rollouts.read | {count + row: read for row, read in fresh_rollouts.read.items()},
    ).select(rows)
    both.groups = kept_rollouts.groups
    return output, both


def _joined(name: str, kept: Tensor, fresh: Tensor, pad_token_id: int) -> Tensor:
    """Two batches of one tensor under one another, padded to the wider: prompts on the left, the rest on the right."""
    if kept.dim() == 1:
        return torch.cat([kept, fresh])
    value = pad_token_id if name.endswith("_ids") else 0
    width = max(kept.shape[1], fresh.shape[1])

    def padded(x: Tensor) -> Tensor:
        extra = width - x.shape[1]
        sides = (extra, 0) if name.startswith("prompt") else (0, extra)
        return torch.nn.functional.pad(x, sides, value=value)

    return torch.cat([padded(kept), padded(fresh)])
