"""How the completions of a step lie on the processes of a training, and which divisions it refuses."""

from __future__ import annotations

from collections.abc import Iterator

from appo.config import Recipe
from appo.errors import SettingError
from appo.policy import settings_for


def rows_per_process(recipe: Recipe, world_size: int) -> int:
    """Completions of one micro-batch on one process. Raises SettingError where a step cannot be divided evenly."""
    training, size = recipe.training, recipe.policy.num_generations
    total, parts = training.prompts_per_step * size, world_size * training.gradient_accumulation_steps
    if total % parts:
        raise SettingError(
            f"training.prompts_per_step={training.prompts_per_step} x policy.num_generations={size} completions: "
            f"must divide evenly over {world_size} processes x {training.gradient_accumulation_steps} accumulation steps"
            "; change one of them"
        )
    return total // parts


def cut_groups(recipe: Recipe, world_size: int) -> Iterator[str]:
    """What is wrong with groups on processes, one line each. Raises SettingError as `rows_per_process`."""
    policy, training = recipe.policy, recipe.training
    size, over = policy.num_generations, f"{world_size} processes"
    rows = rows_per_process(recipe, world_size) * training.gradient_accumulation_steps
    named = f"training.prompts_per_step={training.prompts_per_step}"
    if rows % size and size % rows:
        yield f"{named}: {over} would hold {rows} completions each, which cuts groups of {size} unevenly"
    if rows % size == 0:
        return
    streams = [
        name
        for name in recipe.algorithms
        if len(settings_for(policy.model_copy(update={"algorithm": name})).streams) > 1
    ]
    for reason in ["policy.dynamic_sampling=true"] * policy.dynamic_sampling + [
        f"algorithm {n}" for n in streams
    ]:
        yield f"{named}: {over} do not divide it, and {reason} needs whole groups on each"
