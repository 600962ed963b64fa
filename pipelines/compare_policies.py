"""GRPO, DAPO and APPO from the same weights, on the same data, with the same seeds -> one comparison.

`appo pipeline run` executes this very graph on one machine; `appo pipeline compile` turns it into a
cluster's YAML.
"""

from typing import List  # noqa: UP035 - KFP reads this annotation

from kfp import dsl

from appo.config import Cluster
from components import assemble, base_model, compare, evaluate, plan_trainings, train, validate
from pipelines.pods import for_evaluation, for_training, light


def compare_policies(cluster: Cluster) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for."""

    @dsl.pipeline(
        name="compare-policies",
        description="Train every algorithm of the recipe with every seed, evaluate all of them, compare.",
        display_name="Compare GRPO, DAPO and APPO",
    )
    def graph(recipe: str = "demo", overrides: List[str] = [], storage: str = "s3://appo/runs"):  # noqa: B006, UP006
        """Train every algorithm of the recipe with every seed, evaluate all of them, compare.

        Args:
            recipe: Name of a shipped recipe (appo recipe list), or the text of one in YAML or JSON.
            overrides: Values to change, such as ["training.learning_rate=1e-6", "training.seeds=[0, 1, 2]"].
            storage: Folder or s3:// prefix below which all files of the run lie.
        """
        resolved = light(validate(recipe=recipe, overrides=overrides))
        trainings = light(plan_trainings(recipe=resolved.outputs["recipe"]))
        data = light(assemble(recipe=resolved.outputs["assembly"], storage=storage))
        base = for_training(
            base_model(recipe=resolved.outputs["base"], storage=storage, manifest=data.outputs["manifest"]),
            cluster,
        )
        with dsl.ParallelFor(items=trainings.output, parallelism=cluster.parallel_trainings) as training:
            policy = for_training(
                train(
                    recipe=training.recipe,
                    storage=storage,
                    algorithm=training.algorithm,
                    seed=training.seed,
                    manifest=data.outputs["manifest"],
                    base=base.outputs["model"],
                ),
                cluster,
            )
        finished = policy.outputs["policy"]  # Collected is changed by its use: one for each reader
        scores = for_evaluation(
            evaluate(
                recipe=resolved.outputs["recipe"],
                storage=storage,
                manifest=data.outputs["manifest"],
                base=base.outputs["model"],
                policies=dsl.Collected(finished),
            ),
            cluster,
        )
        light(
            compare(
                recipe=resolved.outputs["recipe"],
                storage=storage,
                policies=dsl.Collected(finished),
                scores=scores.outputs["scores"],
            )
        )

    return graph
