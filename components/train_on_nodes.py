"""One algorithm with one seed, on several nodes -> a checkpoint. Takes no GPU itself: a TrainJob does."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train_on_nodes(
    recipe: str,
    storage: str,
    algorithm: str,
    seed: str,
    variant: str,
    image: str,
    run: str,
    manifest: dsl.Input[dsl.Dataset],
    base: dsl.Input[dsl.Model],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
):
    """Make a TrainJob, wait for it, read what it left; a retried step continues from its newest
    checkpoint.
    """
    from appo import plan, steps
    from components import trainjob

    settings, training = plan.resolve(recipe), plan.Training(algorithm, int(seed), variant)
    step = {"recipe": recipe, "storage": storage, "algorithm": algorithm, "seed": seed, "variant": variant}
    step |= {"manifest": manifest.metadata["location"], "model": base.metadata["location"]}
    trainjob.launch(settings, training, step, image=image, run=run)
    done = steps.trained(settings, storage, training)
    done.fill(policy)
    for name, value in done.metrics.items():
        metrics.log_metric(name, value)
