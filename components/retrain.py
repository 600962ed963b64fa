"""What a retraining adds to a training: is there new data, champion against challenger, who is used from now
on.
"""

from typing import List  # noqa: UP035 - KFP reads this annotation

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("data"), install_kfp_package=False)
def gate(recipe: str, storage: str, manifest: dsl.Input[dsl.Dataset], champion: dsl.Output[dsl.Model]) -> str:
    """`train`, or `unchanged` when the data is what the champion was trained on: then there is nothing to
    do.
    """
    from appo import plan, retraining

    found = retraining.gate(plan.resolve(recipe), storage, manifest=manifest.metadata["location"])
    found.fill(champion)
    return "train" if found.metadata["train"] else "unchanged"


@dsl.component(base_image=image("eval"), install_kfp_package=False)
def evaluate_challenger(
    recipe: str,
    storage: str,
    manifest: dsl.Input[dsl.Dataset],
    champion: dsl.Input[dsl.Model],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    scores: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """The challenger's seeds and the champion, on the same manifest, through one engine."""
    from appo import plan, steps

    done = steps.evaluate(
        plan.resolve(recipe),
        storage,
        manifest=manifest.metadata["location"],
        base=champion.metadata["location"],
        base_name="champion",
        runs=[policy.metadata for policy in policies],
    )
    done.fill(scores)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)


@dsl.component(base_image=image("data"), install_kfp_package=False)
def promote(
    recipe: str,
    storage: str,
    margin: float,
    manifest: dsl.Input[dsl.Dataset],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    scores: dsl.Input[dsl.Artifact],
    decision: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Move the registry's alias only when the challenger is better by the margin beyond the seeds' noise."""
    from appo import plan, retraining

    done = retraining.promote(
        plan.resolve(recipe),
        storage,
        margin=margin,
        manifest=manifest.metadata["location"],
        runs=[policy.metadata for policy in policies],
        evaluations=scores.metadata["location"],
    )
    done.fill(decision)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
