"""One algorithm with one seed -> a checkpoint."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train(
    recipe: str,
    storage: str,
    algorithm: str,
    seed: str,
    variant: str,
    manifest: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Reinforcement; a retried step continues from its newest whole checkpoint."""
    from appo import steps
    from appo.config import parse_recipe
    from appo.plan import Training

    done = steps.train(
        parse_recipe(recipe),
        storage,
        Training(algorithm, int(seed), variant),
        manifest=manifest.metadata["location"],
        model=base.metadata["location"],
    )
    done.fill(policy)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
