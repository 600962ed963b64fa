"""Prompts -> groups of completions with transformers: one prefill per group, whatever its size, in bounded memory.

Each prompt runs through the model once; its key-value cache is then repeated for the group and transformers'
`generate` samples on from there, with all of its logits processors. Attention is SDPA throughout, never eager: what
APPO needs of the attention is read later, in the pass that scores or trains on the completions.

Keys and values are nearly all that rollouts hold. What is asked for at once is cut into parts whose keys and values fit
a budget; since every completion has its own random stream, the cut changes none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.errors import SettingError
from appo.modeling.features import base_model
from appo.modeling.generation import Sampling, nothing_inherited
from appo.modeling.inputs import PromptInputs, vision_kwargs
from appo.training.finite import BrokenDistribution
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
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    device: torch.device,
    memory_gib: float | None = None,
    before_draw: Any = None,
) -> list[list[int]]:
    """Sample `num_generations` completions for each prompt, group after group; EOS included, padding not.

    seeds: one for each completion (see `appo.training.sampling`); None draws from torch's random state, or not at all
    where `sampling` is greedy. memory_gib: for keys and values at once; None sets no bound. before_draw: a logits
    processor that sees what each token is drawn from. Returns as many lists of token ids, each at least one token long.

    Nothing here waits for other processes. Raises BrokenDistribution where logits are not finite, SettingError where one
    completion alone does not fit `memory_gib`.
    """
    owners = [prompt for prompt in prompts for _ in range(num_generations)]
    found: list[list[int]] = []
    for part in parts_within(owners, sampling.max_tokens, token_bytes(model, device), memory_gib):
        own = None if seeds is None else seeds[part.start : part.stop]
        found += _generate(model, owners[part.start : part.stop], sampling, own, device, before_draw)
    return found


def parts_within(
    owners: Sequence[PromptInputs], max_tokens: int, bytes_each: int, memory_gib: float | None
) -> list[range]:
    """Completions, by the prompt that each belongs to, cut in their order into parts of bounded keys and values.

    A part's rows are as wide as its longest prompt. bytes_each: of one token, see `token_bytes`. Raises SettingError.
    """
    if memory_gib is None:
        return [range(len(owners))]
    most = memory_gib * 2**30
    parts: list[range] = []
    start = width = 0
    for place, prompt in enumerate(owners):
        needed = (len(prompt.ids) + max_tokens) * bytes_each
        if needed > most:
            raise SettingError(
                f"training.rollout_memory_gib={memory_gib:g}: one completion of sample {prompt.sample.id} "
                f"({len(prompt.ids)} prompt tokens, and {max_tokens} drawn) holds {needed / 2**30:.3g} GiB of keys and "
                "values; raise it, or give fewer or smaller frames"
            )
        width = max(width, len(prompt.ids))
        if (place + 1 - start) * (width + max_tokens) * bytes_each > most:
            parts.append(range(start, place))
            start, width = place, len(prompt.ids)
    return [*parts, range(start, len(owners))]


def token_bytes(model: Any, device: torch.device) -> int:
    """Bytes that keys and values of one token take, in all layers, as the model runs now (see `_compute_type`)."""
    text = model.config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    stream: torch.dtype = base_model(model).language_model.embed_tokens.weight.dtype
    each: int = 2 * text.num_hidden_layers * text.num_key_value_heads * width
    return each * (_compute_type(device) or stream).itemsize


def _compute_type(device: torch.device) -> torch.dtype | None:
    """What attention computes in under autocast; None without, where it is the weights' type."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _generate(
    model: Any,
    owners: Sequence[PromptInputs],
    sampling: Sampling,
    seeds: Sequence[int] | None,
    device: torch.device,
    before_draw: Any,
) -> list[list[int]]:
    """One completion for each of `owners`, all at once; those of one prompt stand side by side."""
    prompts: list[PromptInputs] = []
    counts: list[int] = []
    for prompt in owners:
        if prompts and prompt is prompts[-1]:
            counts[-1] += 1
        else:
            prompts.append(prompt)
            counts.append(1)
    owner = torch.arange(len(prompts), device=device).repeat_interleave(torch.tensor(counts, device=device))
    cache = prefill(model, prompts, sampling.pad_token, device)
    cache.batch_select_indices(owner)
    ids, mask = left_padded(prompts, sampling.pad_token, device)
    # transformers continues positions from the attention mask's count plus this offset of each row.
    deltas = [int(p.positions.max()) + 1 - len(p.ids) for p in prompts]
    base_model(model).rope_deltas = torch.tensor(deltas, device=device)[owner][:, None]
    processors: list[Any] = []
    if seeds is not None:
        # Temperature and truncation are given as processors because the draw itself is one: see `sampling`.
        watching = [] if before_draw is None else [before_draw]
        processors = [*sampling.warpers(), *watching, draw := DrawPerRow(seeds, device)]
    with nothing_inherited(model):
        sampled = model.generate(
            input_ids=ids[owner],
            attention_mask=mask[owner],
            past_key_values=cache,
            generation_config=sampling.for_transformers(drawn_elsewhere=seeds is not None),
            logits_processor=processors,
            synced_gpus=False,
        )
    if seeds is not None and (broken := draw.broken()):
        raise BrokenDistribution(list(dict.fromkeys(owners[row].sample.id for row in broken)))
    return until_end(sampled[:, ids.shape[1] :], sampling.end_tokens)


def prefill(model: Any, prompts: Sequence[PromptInputs], pad_token: int, device: torch.device) -> Any:
    """Keys and values of all prompts but for their last tokens, padded on the left; each video runs once.

    Prompts run padded on the right: no token sees what comes after it, so that causal attention needs no mask, which
    would be of (B, 1, L, L). Their keys and values are then moved to the right end of their rows.
    """
    lengths = [len(p.ids) - 1 for p in prompts]
    width = max(lengths)
    ids = torch.full((len(prompts), width), pad_token)
    positions = torch.zeros(3, len(prompts), width, dtype=torch.long)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, :length] = prompt.ids[:-1]
        positions[:, row, :length] = prompt.positions[:, :-1]
    cache = _cache()
    # Through the whole model, since a sharded one gathers its parts there; the head sees one position.
    model(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
        **vision_kwargs(prompts, model, device),
    )
    if min(lengths) < width:
        shift = width - torch.tensor(lengths, device=device)
        source = (torch.arange(width, device=device) - shift[:, None]) % width
        for layer in cache.layers:
            layer.keys, layer.values = _moved(layer.keys, source), _moved(layer.values, source)
    return cache


def _cache() -> Any:
    """An empty cache of keys and values in the type that attention computes in.

    Under autocast over float32 weights transformers would keep both in float32, and attention round all of them at
    every token. Made without a configuration, so that layers with a sliding window keep all tokens: a prompt's last ones
    may be padding.
    """
    from transformers import DynamicCache

    class Cache(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            kept = _compute_type(keys.device) or keys.dtype
            found: tuple[Tensor, Tensor] = super().update(keys.to(kept), values.to(kept), *args, **kwargs)
            return found

    return Cache()


def _moved(states: Tensor, source: Tensor) -> Tensor:
    """(B, heads, L, D) -> the same with place j of row b taken from source[b, j]."""
    batch, heads, _, width = states.shape
    return states.gather(2, source[:, None, :, None].expand(batch, heads, -1, width))


def left_padded(
    prompts: Sequence[PromptInputs], pad_token: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (B, L) each, of prompts padded on the left."""
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad_token)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt.ids)
        ids[row, start:] = prompt.ids
        mask[row, start:] = 1
    return ids.to(device), mask.to(device)


def until_end(sampled: Tensor, end_tokens: Sequence[int]) -> list[list[int]]:
    """Cut every row of (B, N) after its first end token."""
    completions = []
    for row in sampled.tolist():
        stop = next((place for place, token in enumerate(row) if token in end_tokens), len(row) - 1)
        completions.append(row[: stop + 1])
    return completions
