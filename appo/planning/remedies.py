"""A recipe that does not fit -> settings that may make it fit, those first that change the least of what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from appo.planning.setting import alone

if TYPE_CHECKING:
    from appo.config import Recipe

MOST_AT_ONCE = 3
ANOTHER_SETTING = 4  # what a second setting costs: one bolder change is easier to follow than two small ones


def candidates(recipe: Recipe, gpus: int) -> Iterator[tuple[str, ...]]:
    """Sets of `key=value`, one setting each at first, in order of what they change."""
    single = _settings(recipe, gpus)
    found = [
        (sum(cost for cost, _ in chosen) + ANOTHER_SETTING * (len(chosen) - 1), chosen)
        for size in range(1, MOST_AT_ONCE + 1)
        for chosen in combinations(single, size)
        if len({key(text) for _, text in chosen}) == size
    ]
    always = ("training.distributed=ddp",) if alone(recipe, gpus) else ()
    for _, chosen in sorted(found, key=lambda entry: entry[0]):
        yield (*always, *(text for _, text in chosen))


def key(setting: str) -> str:
    return setting.partition("=")[0]


def changed(recipe: Recipe, settings: Sequence[str]) -> Recipe | None:
    """The recipe with these settings; None where they do not fit together."""
    values = recipe.model_dump(mode="json")
    for setting in settings:
        path, _, text = setting.partition("=")
        *sections, last = path.split(".")
        node: dict[str, Any] = values
        for section in sections:
            if node.get(section) is None:
                node[section] = {}
            node = node[section]
        node[last] = yaml.safe_load(text)
    try:
        return type(recipe).model_validate(values)
    except ValidationError:
        return None


def _settings(recipe: Recipe, gpus: int) -> list[tuple[int, str]]:
    """(cost, key=value) of single settings. Up to 3 the same numbers come out; up to 9 the same is learned, in another
    layout or precision; above, less is trained or shown.
    """
    model, training, policy, video = recipe.model, recipe.training, recipe.policy, recipe.video
    found: list[tuple[int, str]] = []
    if not training.gradient_checkpointing:
        found.append((1, "training.gradient_checkpointing=true"))
    if not training.shared_prefix:
        found.append((1, "training.shared_prefix=true"))
    if not training.feature_cache and model.freeze_vision:
        found.append((1, "training.feature_cache=true"))
    found += [(2, f"training.gradient_accumulation_steps={n}") for n in _more_steps(recipe, gpus)]
    found += _rollout_settings(recipe)
    if gpus > 1 and training.distributed != "fsdp2":
        found.append((3, "training.distributed=fsdp2"))
    if model.dtype == "float32":
        found.append((6, "model.dtype=bfloat16"))
    if model.lora is None:
        found.append((10, "model.lora.rank=16"))
    found += [
        (14 + n, f"policy.max_completion_length={policy.max_completion_length >> n}")
        for n in (1, 2)
        if policy.max_completion_length >> n >= max(64, policy.overlong_buffer)
    ]
    found += [
        (15 + n, f"video.max_pixels={video.max_pixels >> n}")
        for n in (1, 2)
        if video.max_pixels >> n >= video.min_pixels
    ]
    if policy.num_generations > 4:
        found.append((18, "policy.num_generations=4"))
    return found


def _more_steps(recipe: Recipe, gpus: int) -> list[int]:
    """Accumulation steps, more than now, that leave whole groups in a micro-batch; else those that do not."""
    training, size = recipe.training, recipe.policy.num_generations
    now, rows = training.gradient_accumulation_steps, training.prompts_per_step * size
    possible = [n for n in range(now + 1, rows // gpus + 1) if rows % (gpus * n) == 0]
    whole = [n for n in possible if rows // (gpus * n) % size == 0]
    return [n for n in (whole or possible) if n & (n - 1) == 0 or len(whole or possible) < 4][:6]


def _rollout_settings(recipe: Recipe) -> list[tuple[int, str]]:
    training = recipe.training
    if training.rollout == "vllm_colocate":
        now = training.vllm_gpu_memory_utilization
        shares = sorted(
            (n / 20 for n in range(2, 13)), key=lambda share: abs(share - now)
        )  # the nearest first
        return [(2, f"training.vllm_gpu_memory_utilization={share:g}") for share in shares if share != now]
    budget = training.rollout_memory_gib
    return [(2, f"training.rollout_memory_gib={n}") for n in (16, 8, 4, 2, 1) if n < budget]
