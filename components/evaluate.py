"""Checkpoints -> scores, all through one engine."""

from typing import List  # noqa: UP035 - KFP reads this annotation

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("eval"), install_kfp_package=False)
def evaluate(
    recipe: str,
    storage: str,
    manifest: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    scores: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Generate, parse, score; every prediction is kept."""
    from appo import steps
    from appo.config import parse_recipe

    done = steps.evaluate(
        parse_recipe(recipe),
        storage,
        manifest=manifest.metadata["location"],
        base=base.metadata["location"],
        runs=[policy.metadata for policy in policies],
    )
    done.fill(scores)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
