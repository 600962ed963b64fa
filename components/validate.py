"""First steps: a recipe's name and overrides -> resolved recipes, and the list of trainings. Needs no GPU."""

from typing import Any, Dict, List, NamedTuple  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("data"), install_kfp_package=False)
def validate(
    recipe: str,
    overrides: List[str],  # noqa: UP006
    algorithm: str = "",
    seed: int = -1,
    variants: List[str] = [],  # noqa: B006, UP006
    quotas: Dict[str, Any] = {},  # noqa: B006, UP006
    data_seed: int = -1,
    num_frames: int = 0,
    fps: float = 0.0,
    max_pixels: int = 0,
) -> NamedTuple("Resolved", [("recipe", str), ("assembly", str), ("base", str)]):
    """Refuse what cannot run; hand on only what each step reads, so that equal work is found in the cache."""
    from appo import plan, steps

    data = plan.data_overrides(
        quotas=quotas, data_seed=data_seed, num_frames=num_frames, fps=fps, max_pixels=max_pixels
    )
    narrowed = [f"algorithms=[{algorithm}]"] if algorithm else []
    narrowed += [f"training.seeds=[{seed}]"] if seed >= 0 else []
    resolved = steps.validate(recipe, [*overrides, *data, *narrowed], variants)
    return (
        resolved.to_yaml(),
        plan.assembly_recipe(resolved).to_yaml(),
        plan.base_recipe(resolved).to_yaml(),
    )


@dsl.component(base_image=image("data"), install_kfp_package=False)
def plan_trainings(recipe: str, variants: List[str] = []) -> List[Dict[str, str]]:  # noqa: B006, UP006
    """Every algorithm (or variant) with every seed, each with its recipe: what the trainings fan out over.

    The recipe travels in the item because kfp.local puts the item in place of every parameter that a loop
    reads from a step outside.
    """
    from appo import plan

    resolved = plan.resolve(recipe)
    made = [(training, resolved) for training in plan.trainings(resolved)]
    return [
        {"algorithm": t.algorithm, "seed": str(t.seed), "variant": t.variant, "recipe": r.to_yaml()}
        for t, r in (plan.ablation(resolved, variants) if variants else made)
    ]
