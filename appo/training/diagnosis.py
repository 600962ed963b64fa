"""A model and some prompts -> what APPO sees in fresh groups: answers, attention, crucial frames, weights.

Outside of training steps: before and after a training on the same prompts, and behind `appo explain`. Works for a
model trained by any algorithm, so that their attention can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from appo.config import Recipe
from appo.data.schema import VideoSample
from appo.modeling.generation import rollout_sampling
from appo.modeling.inputs import PromptInputs
from appo.storage import write_atomic
from appo.training.layouts import whole_head
from appo.training.perceiving import group_weights, layers_to_read
from appo.training.rollouts import generate_groups
from appo.training.sampling import stream_seed
from appo.training.scoring import Row, score
from appo.training.store import PromptStore

LOOKING = -1  # stands where a training's step number would, so that looking never repeats a rollout's draws


@dataclass(frozen=True, slots=True)
class SeenGroup:
    """One group, in plain values. attention: (G, N, T); weights: (G, N); both padded to the longest completion."""

    sample_id: str
    question: str
    completions: list[str]
    tokens: list[list[str]]
    rewards: dict[str, list[float | None]]
    attention: list[list[list[float]]]
    crucial_frames: list[int]
    right: list[int]
    wrong: list[int]
    psi: list[list[int]]
    weights: list[list[float]]
    key_frames: list[int]
    timestamps_s: list[float]

    @property
    def hit(self) -> bool | None:
        """Whether the crucial frames hold a true key frame; None where one of the two is unknown or empty."""
        if not self.key_frames or not self.crucial_frames:
            return None
        return bool(set(self.key_frames) & set(self.crucial_frames))


@torch.no_grad()
def look(
    model: Any,
    processor: Any,
    store: PromptStore,
    sample_ids: Mapping[int, str],
    recipe: Recipe,
    rewards: Mapping[str, Callable[[str, VideoSample], float | None]],
    *,
    seed: int = 0,
    prompts_at_once: int = 16,
) -> list[SeenGroup]:
    """Roll out one group for each sample and read it. Draws nothing from torch's random state.

    sample_ids: by place among all groups that are looked at, which decides a group's draws whichever process makes it.
    """
    ensure_fused_head(model, recipe.policy.temperature)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    seen: list[SeenGroup] = []
    places, size = list(sample_ids), recipe.policy.num_generations
    for start in range(0, len(places), prompts_at_once):
        part = places[start : start + prompts_at_once]
        prompts = [store.get(sample_ids[place], model) for place in part]
        seeds = [
            stream_seed(seed, LOOKING, place * size + member) for place in part for member in range(size)
        ]
        seen += _look_at(model, processor, prompts, recipe, rewards, seeds, device)
    model.train(was_training)
    return seen


def hit_rate(seen: Sequence[SeenGroup]) -> float | None:
    """Share of groups whose crucial frames hold a true key frame, among those where both are known."""
    known = [group.hit for group in seen if group.hit is not None]
    return sum(known) / len(known) if known else None


def write_groups(path: Path, seen: Iterable[SeenGroup], *, step: int, **labels: Any) -> None:
    """Add the groups of one step to a JSONL file, one a line, with `labels` (algorithm, seed) on each.

    Those of the same or a later step, which an earlier attempt left, are replaced.
    """
    kept = [line for line in _lines(path) if line["step"] < step]
    lines = [*kept, *({**labels, "step": step, **asdict(group)} for group in seen)]
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_groups(path: Path, *, step: int) -> list[SeenGroup]:
    """The groups that `write_groups` left of one step."""
    names = [field.name for field in fields(SeenGroup)]
    return [
        SeenGroup(**{name: line[name] for name in names}) for line in _lines(path) if line["step"] == step
    ]


def _lines(path: Path) -> list[dict[str, Any]]:
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def ensure_fused_head(model: Any, temperature: float) -> None:
    """Give a model outside of a trainer the head that TRL's trainers give theirs; once."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not getattr(inner, "_has_fused_head", False):
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(inner, temperature=temperature, outputs=("log_probs", "entropy"))
        inner._has_fused_head = True


def _look_at(
    model: Any,
    processor: Any,
    prompts: Sequence[PromptInputs],
    recipe: Recipe,
    rewards: Mapping[str, Callable[[str, VideoSample], float | None]],
    seeds: Sequence[int],
    device: torch.device,
) -> list[SeenGroup]:
    tokenizer, size = processor.tokenizer, recipe.policy.num_generations
    sampled = generate_groups(
        model,
        prompts,
        size,
        sampling=rollout_sampling(recipe, model, tokenizer),
        seeds=seeds,
        device=device,
        memory_gib=recipe.training.rollout_memory_gib,
    )
    rows = [Row(prompts[i // size], i // size, torch.tensor(ids)) for i, ids in enumerate(sampled)]
    longest = max(len(ids) for ids in sampled)
    scores = score(
        model,
        rows,
        longest,
        shared_prefix=True,
        pad_token_id=tokenizer.pad_token_id,
        device=device,
        probe_layers=layers_to_read(recipe, model),
        probe_chunk_mib=recipe.perception.probe_chunk_mib,
    )
    assert scores.hidden is not None, "a probe was asked for"
    head = whole_head(model, scores.hidden.dtype)
    seen = []
    for index, prompt in enumerate(prompts):
        own = slice(index * size, (index + 1) * size)
        texts = tokenizer.batch_decode(sampled[own], skip_special_tokens=True)
        rewarded = {
            name: [function(text, prompt.sample) for text in texts] for name, function in rewards.items()
        }
        accuracy = [float("nan") if r is None else r for r in rewarded["accuracy"]]
        width = max(len(ids) for ids in sampled[own])
        found, attention = None, []
        if prompt.num_frames and scores.attention is not None and scores.hidden is not None:
            view = {
                "attention": scores.attention[own],
                "hidden": scores.hidden[own],
                "lengths": torch.tensor([len(ids) for ids in sampled[own]], device=device),
                "accuracy": torch.tensor(accuracy, device=device),
                "frames": torch.full((size,), prompt.num_frames, device=device),
            }
            found = group_weights(view, recipe, *head)
            attention = _rounded(scores.attention[own, :width, : prompt.num_frames], 6)
        seen.append(
            SeenGroup(
                sample_id=prompt.sample.id,
                question=prompt.sample.question,
                completions=texts,
                tokens=[[tokenizer.decode([token]) for token in ids] for ids in sampled[own]],
                rewards=rewarded,
                attention=attention,
                crucial_frames=[] if found is None else list(found.frames),
                right=[] if found is None else list(found.right),
                wrong=[] if found is None else list(found.wrong),
                psi=[] if found is None else [list(frames) for frames in found.psi],
                weights=[] if found is None else _rounded(found.weights[:, :width], 4),
                key_frames=list(prompt.key_frames),
                timestamps_s=[round(t, 3) for t in prompt.timestamps_s],
            )
        )
    return seen


def _rounded(values: torch.Tensor, digits: int) -> Any:
    return torch.round(values.double().cpu(), decimals=digits).tolist()
