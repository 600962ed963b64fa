"""The weights that every training starts from: the recipe's checkpoint, or a warm start."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def base_model(
    recipe: str,
    storage: str,
    manifest: dsl.Input[dsl.Dataset],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Pass a named checkpoint through; without one, make a small model and train it by supervision."""
    from appo import steps
    from appo.config import parse_recipe

    done = steps.base_model(parse_recipe(recipe), storage, manifest=manifest.metadata["location"])
    done.fill(model)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
