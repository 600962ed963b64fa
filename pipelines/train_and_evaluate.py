"""One algorithm, one seed: the run that a person starts from the form in Kubeflow's pages."""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from appo.config import Cluster
from components import validate
from pipelines.blocks import CONFIG, closing, train_all
from pipelines.parameters import described
from pipelines.pods import always, light

# A drop-down in the form that starts a run. The compiled format knows it, the SDK's annotations do not yet.
CHOICES = {"algorithm": ["grpo", "dapo", "appo", "pa_grpo"]}


def train_and_evaluate(cluster: Cluster, *, fill_features: bool) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for; see `pipelines.catalog.build`."""

    @dsl.pipeline(
        name="train-and-evaluate", display_name="Train one algorithm and evaluate it", pipeline_config=CONFIG
    )
    @described
    def graph(
        algorithm: str = "appo",
        seed: int = 0,
        recipe: str = "demo",
        overrides: List[str] = [],  # noqa: B006, UP006
        storage: str = "s3://appo/runs",
        quotas: Dict[str, Any] = {},  # noqa: B006, UP006
        data_seed: int = -1,
        num_frames: int = 0,
        fps: float = 0.0,
        max_pixels: int = 0,
    ):
        """Train one algorithm with one seed and evaluate it beside the weights it started from.

        Args:
            algorithm: What to train with.
            seed: Of sampling, shuffling and initialisation; 0 or more.
            overrides: Values to change, such as ["training.learning_rate=1e-6"].
        """
        with closing(storage, cluster):
            checked = validate(
                recipe=recipe,
                overrides=overrides,
                algorithm=algorithm,
                seed=seed,
                quotas=quotas,
                data_seed=data_seed,
                num_frames=num_frames,
                fps=fps,
                max_pixels=max_pixels,
            )
            train_all(always(light(checked)), storage, cluster, fill_features=fill_features)

    return graph
