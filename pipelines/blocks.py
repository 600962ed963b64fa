"""The parts that several graphs share: from a checked recipe to a comparison."""

from contextlib import nullcontext
from typing import Any

from kfp import dsl

from appo.config import Cluster
from components import (
    assemble,
    base_model,
    close,
    compare,
    evaluate,
    features,
    plan_trainings,
    train,
    train_on_nodes,
)
from components.images import image
from pipelines.pods import always, as_launcher, for_evaluation, for_training, light

# Argo's objects of a finished run; Kubeflow's own pages and MLflow keep what matters.
CONFIG = dsl.PipelineConfig(
    ttl_seconds_after_success=7 * 24 * 3600,
    ttl_seconds_after_failure=30 * 24 * 3600,
)


def closing(storage: Any, cluster: Cluster) -> Any:
    """Everything inside is followed by the exit handler.

    Not on one machine: there the next attempt finds the journals itself, and nothing else runs below the
    folder.
    """
    if cluster.local:
        return nullcontext()
    return dsl.ExitHandler(always(light(close(storage=storage))), name="run")


def train_all(
    resolved: dsl.PipelineTask,
    storage: Any,
    cluster: Cluster,
    *,
    fill_features: bool,
    variants: Any = None,
) -> None:
    """Assemble, get the base model, train in a fan-out, evaluate all checkpoints at once, compare.

    resolved: the task that checked the recipe. fill_features: compute the trainings' visual features in a step of
    its own. variants: of an ablation; None: every algorithm of the recipe.
    """
    recipe = resolved.outputs["recipe"]
    # An empty list as a constant, or the pipeline's parameter.
    trainings = light(plan_trainings(recipe=recipe, **({} if variants is None else {"variants": variants})))
    manifest = light(assemble(recipe=resolved.outputs["assembly"], storage=storage)).outputs["manifest"]
    base = for_training(
        base_model(recipe=resolved.outputs["base"], storage=storage, manifest=manifest), cluster
    ).outputs["model"]
    filled = filling(recipe, cluster, manifest=manifest, base=base) if fill_features else None
    with dsl.ParallelFor(items=trainings.output, parallelism=cluster.parallel_trainings) as training:
        policy = train_one(training, storage, cluster, manifest=manifest, base=base, after=filled)
    # Collected is changed by its use: one for each reader.
    scores = for_evaluation(
        evaluate(
            recipe=recipe, storage=storage, manifest=manifest, base=base, policies=dsl.Collected(policy)
        ),
        cluster,
    ).outputs["scores"]
    light(
        compare(
            recipe=recipe, storage=storage, manifest=manifest, policies=dsl.Collected(policy), scores=scores
        )
    )


def filling(recipe: Any, cluster: Cluster, *, manifest: Any, base: Any) -> dsl.PipelineTask:
    """The step between base model and trainings that runs the vision tower for all of them, on one GPU."""
    one = cluster.model_copy(update={"gpus_per_node": min(1, cluster.gpus_per_node)})
    return for_training(features(recipe=recipe, manifest=manifest, base=base), one)


def train_one(
    training: Any,
    storage: Any,
    cluster: Cluster,
    *,
    manifest: Any,
    base: Any,
    after: dsl.PipelineTask | None = None,
) -> Any:
    """One iteration of the fan-out: in a pod, or over several nodes when the recipe asks for them. after: a step
    that must have ended.
    """
    given = {
        "recipe": training.recipe,
        "storage": storage,
        "algorithm": training.algorithm,
        "seed": training.seed,
        "variant": training.variant,
        "manifest": manifest,
        "base": base,
    }
    if cluster.nodes > 1:
        run = dsl.PIPELINE_JOB_NAME_PLACEHOLDER
        task = as_launcher(train_on_nodes(**given, image=image("train"), run=run), cluster)
    else:
        task = for_training(train(**given), cluster)
    if after is not None:
        task.after(after)
    return task.outputs["policy"]
