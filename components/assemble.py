"""Videos and questions -> the manifest that every later step reads."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("data"), install_kfp_package=False)
def assemble(
    recipe: str,
    storage: str,
    manifest: dsl.Output[dsl.Dataset],
    card: dsl.Output[dsl.HTML],
    counts: dsl.Output[dsl.Metrics],
):
    """Read, check, choose and decode; rejects are listed, and stop the run above the recipe's rate."""
    from dataclasses import replace

    from appo import steps
    from appo.config import parse_recipe

    done = steps.assemble(parse_recipe(recipe), storage)
    done.fill(card)
    replace(done, text=done.location).fill(manifest)
    for name, value in done.metrics.items():
        counts.log_metric(name, value)
