"""Trainings and their scores -> one page: means, deviations, ratios, plots."""

from typing import List  # noqa: UP035 - KFP reads this annotation

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("eval"), install_kfp_package=False)
def compare(
    recipe: str,
    storage: str,
    manifest: dsl.Input[dsl.Dataset],
    policies: dsl.Input[List[dsl.Model]],  # noqa: UP006
    scores: dsl.Input[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
):
    """Write the report, log it to MLflow, print the table."""
    from dataclasses import replace

    from appo import steps
    from appo.config import parse_recipe

    done = steps.compare(
        parse_recipe(recipe),
        storage,
        manifest=manifest.metadata["location"],
        runs=[policy.metadata for policy in policies],
        evaluations=scores.metadata["location"],
    )
    done.fill(report)
    replace(done, text=done.markdown).fill(table)
