"""Prompts -> groups of completions with transformers: one prefill per group, whatever its size.

Each prompt runs through the model once; its key-value cache is then repeated for the group and transformers'
`generate` samples on from there, with all of its logits processors. Attention is SDPA throughout, never eager: what
APPO needs of the attention is read later, in the pass that scores or trains on the completions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.modeling.features import base_model
from appo.modeling.inputs import PromptInputs, vision_kwargs
from appo.training.sampling import DrawPerRow


@dataclass
class Rollouts:
    """What TRL's batch dictionary has no place for, by row of the generation batch of this process."""

    prompts: list[PromptInputs]
    groups: list[int]
    seeds: list[int]
    lengths: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rewards: dict[str, Tensor] = field(default_factory=dict)  # name -> (B,), NaN where there is none
    advantages: Tensor | None = None  # (B,), as drawn; those of refilled groups are in TRL's batch dictionary
    # row -> attention (N, T), hidden (N, H), log-probabilities (N,)
    read: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def select(self, rows: Sequence[int]) -> Rollouts:
        return Rollouts(
            prompts=[self.prompts[r] for r in rows],
            groups=[self.groups[r] for r in rows],
            seeds=[self.seeds[r] for r in rows],
            lengths=[self.lengths[r] for r in rows],
            tokens=[self.tokens[r] for r in rows],
            texts=[self.texts[r] for r in rows],
            rewards={name: values[list(rows)] for name, values in self.rewards.items()},
            read={new: self.read[old] for new, old in enumerate(rows) if old in self.read},
        )


@torch.no_grad()
def generate_groups(
    model: Any,
    prompts: Sequence[PromptInputs],
    num_generations: int,
    *,
    generation_config: Any,
    seeds: Sequence[int] | None = None,
    pad_token_id: int,
    device: torch.device,
    before_draw: Any = None,
) -> list[list[int]]:
    """Sample `num_generations` completions for each prompt, group after group; EOS included, padding not.

    seeds: one for each completion (see `appo.training.sampling`); None draws as `generation_config` says, for greedy
    decoding. before_draw: a logits processor that sees what each token is drawn from. Returns as many lists of token
    ids, each at least one token long.
    """
    ids, mask, positions = left_padded(prompts, pad_token_id, device)
    width = ids.shape[1]
    cache = prefill(model, prompts, ids[:, :-1], mask[:, :-1], positions[:, :, :-1], device)
    cache.batch_repeat_interleave(num_generations)
    # transformers continues positions from the attention mask's count plus this offset of each row.
    deltas = [int(p.positions.max()) + 1 - len(p.ids) for p in prompts]
    base_model(model).rope_deltas = torch.tensor(deltas, device=device).repeat_interleave(num_generations)[
        :, None
    ]
    processors: list[Any] = []
    if seeds is not None:
        # Temperature and truncation are given as processors because the draw itself is one: see `sampling`.
        watching = [] if before_draw is None else [before_draw]
        processors = [*warpers(generation_config), *watching, DrawPerRow(seeds, device)]
        generation_config = copy.deepcopy(generation_config)
        generation_config.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None)
    sampled = model.generate(
        input_ids=ids.repeat_interleave(num_generations, dim=0),
        attention_mask=mask.repeat_interleave(num_generations, dim=0),
        past_key_values=cache,
        generation_config=generation_config,
        logits_processor=processors,
    )
    return until_eos(sampled[:, width:], generation_config.eos_token_id)


def warpers(generation_config: Any) -> list[Any]:
    """transformers' processors for temperature, top-k, top-p and min-p, in its own order."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    settings = generation_config
    found: list[Any] = []
    if settings.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1.0:
        found.append(TopPLogitsWarper(settings.top_p))
    if settings.min_p:
        found.append(MinPLogitsWarper(settings.min_p))
    return found


def prefill(
    model: Any,
    prompts: Sequence[PromptInputs],
    ids: Tensor,
    mask: Tensor,
    positions: Tensor,
    device: torch.device,
) -> Any:
    """Keys and values of (B, L) padded prompts, each video standing once."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config())
    # Through the whole model, since a sharded one gathers its parts there; the head sees one position.
    model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **vision_kwargs(prompts, model, device),
    )
    return cache


def left_padded(
    prompts: Sequence[PromptInputs], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, L), attention mask (B, L) and rotary positions (3, B, L) of prompts padded on the left."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad_token_id)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.ids)
        ids[row, start:] = prompt.ids
        mask[row, start:] = 1
        positions[:, row, start:] = prompt.positions
    return ids.to(device), mask.to(device), positions.to(device)


def until_eos(sampled: Tensor, eos_token_id: int | Sequence[int]) -> list[list[int]]:
    """Cut every row of (B, N) after its first end token."""
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    completions = []
    for row in sampled.tolist():
        stop = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        completions.append(row[: stop + 1])
    return completions


def placeholder_tokens(model: Any) -> list[int]:
    """Image and video tokens: sampled in a completion they would stand for features that do not exist."""
    names = ("image_token_id", "video_token_id")
    return [getattr(model.config, name) for name in names if getattr(model.config, name, None) is not None]
