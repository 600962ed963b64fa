"""Vision features of every video, computed once before the trainings that share them."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def features(
    recipe: str,
    manifest: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    filled: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Fill the recipe's feature cache; what is there already is left as it is."""
    from appo import steps
    from appo.config import parse_recipe

    done = steps.features(
        parse_recipe(recipe), manifest=manifest.metadata["location"], model=base.metadata["location"]
    )
    done.fill(filled)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
