"""New data -> a challenger, and a champion that changes only on evidence. Meant for a schedule."""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from appo.config import Cluster
from components import assemble, base_model, evaluate_challenger, gate, plan_trainings, promote, validate
from pipelines.blocks import CONFIG, closing, filling, train_one
from pipelines.parameters import described
from pipelines.pods import always, for_evaluation, for_training, light

# As in train_and_evaluate: a drop-down.
CHOICES = {"algorithm": ["grpo", "dapo", "appo", "pa_grpo"]}


def retrain(cluster: Cluster, *, fill_features: bool) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for; see `pipelines.catalog.build`."""

    @dsl.pipeline(name="retrain", display_name="Retrain, and promote on evidence", pipeline_config=CONFIG)
    @described
    def graph(
        algorithm: str = "appo",
        margin: float = 0.01,
        recipe: str = "demo",
        overrides: List[str] = [],  # noqa: B006, UP006
        storage: str = "s3://appo/runs",
        quotas: Dict[str, Any] = {},  # noqa: B006, UP006
        data_seed: int = -1,
        num_frames: int = 0,
        fps: float = 0.0,
        max_pixels: int = 0,
    ):
        """Train a challenger when the data changed, and promote it only when it is better beyond the seeds'
        noise.

        Args:
            algorithm: What to train with.
            margin: By how much accuracy (0 to 1) a challenger must be better, beyond the noise of the seeds.
            overrides: Values to change, such as ["training.seeds=[0, 1, 2]"].
        """
        with closing(storage, cluster):
            resolved = validate(
                recipe=recipe,
                overrides=overrides,
                algorithm=algorithm,
                quotas=quotas,
                data_seed=data_seed,
                num_frames=num_frames,
                fps=fps,
                max_pixels=max_pixels,
            )
            always(light(resolved))
            checked = resolved.outputs["recipe"]
            assembled = light(assemble(recipe=resolved.outputs["assembly"], storage=storage))
            manifest = assembled.outputs["manifest"]
            found = always(light(gate(recipe=checked, storage=storage, manifest=manifest)))
            with dsl.If(found.outputs["Output"] == "train", name="new-data"):
                trainings = light(plan_trainings(recipe=checked))
                base = for_training(
                    base_model(recipe=resolved.outputs["base"], storage=storage, manifest=manifest), cluster
                ).outputs["model"]
                filled = filling(checked, cluster, manifest=manifest, base=base) if fill_features else None
                with dsl.ParallelFor(
                    items=trainings.output, parallelism=cluster.parallel_trainings
                ) as training:
                    policy = train_one(training, storage, cluster, manifest=manifest, base=base, after=filled)
                scores = for_evaluation(
                    evaluate_challenger(
                        recipe=checked,
                        storage=storage,
                        manifest=manifest,
                        champion=found.outputs["champion"],
                        policies=dsl.Collected(policy),
                    ),
                    cluster,
                ).outputs["scores"]
                light(
                    promote(
                        recipe=checked,
                        storage=storage,
                        margin=margin,
                        manifest=manifest,
                        policies=dsl.Collected(policy),
                        scores=scores,
                    )
                )

    return graph
