"""First steps: a recipe's name and overrides -> resolved recipes, and the list of trainings. Needs no GPU."""

from typing import Dict, List, NamedTuple  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("data"), install_kfp_package=False)
def validate(
    recipe: str,
    overrides: List[str],  # noqa: UP006
) -> NamedTuple("Resolved", [("recipe", str), ("assembly", str), ("base", str)]):
    """Refuse what cannot run; hand on only what each step reads, so that equal work is found in the cache."""
    from appo import plan, steps

    resolved = steps.validate(recipe, overrides)
    return (
        resolved.to_yaml(),
        plan.assembly_recipe(resolved).to_yaml(),
        plan.base_recipe(resolved).to_yaml(),
    )


@dsl.component(base_image=image("data"), install_kfp_package=False)
def plan_trainings(recipe: str) -> List[Dict[str, str]]:  # noqa: UP006
    """Every algorithm with every seed, each with its recipe: what the trainings fan out over.

    The recipe travels in the item because kfp.local puts the item in place of every parameter that a loop
    reads from a step outside.
    """
    from appo import plan
    from appo.config import parse_recipe

    return [
        {"algorithm": training.algorithm, "seed": str(training.seed), "recipe": recipe}
        for training in plan.trainings(parse_recipe(recipe))
    ]
