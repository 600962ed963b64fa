"""GRPO, DAPO and APPO from the same weights, on the same data, with the same seeds -> one comparison.

`appo pipeline run` executes this very graph on one machine; `appo pipeline compile` turns it into a cluster's
YAML.
"""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from appo.config import Cluster
from components import validate
from pipelines.blocks import CONFIG, closing, train_all
from pipelines.parameters import described
from pipelines.pods import always, light


def compare_policies(cluster: Cluster, *, fill_features: bool) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for; see `pipelines.catalog.build`."""

    @dsl.pipeline(name="compare-policies", display_name="Compare GRPO, DAPO and APPO", pipeline_config=CONFIG)
    @described
    def graph(
        recipe: str = "demo",
        overrides: List[str] = [],  # noqa: B006, UP006
        storage: str = "s3://appo/runs",
        quotas: Dict[str, Any] = {},  # noqa: B006, UP006
        data_seed: int = -1,
        num_frames: int = 0,
        fps: float = 0.0,
        max_pixels: int = 0,
    ):
        """Train every algorithm of the recipe with every seed, evaluate all of them, compare.

        Args:
            overrides: Values to change, such as ["training.learning_rate=1e-6", "training.seeds=[0, 1, 2]"].
        """
        with closing(storage, cluster):
            checked = validate(
                recipe=recipe,
                overrides=overrides,
                quotas=quotas,
                data_seed=data_seed,
                num_frames=num_frames,
                fps=fps,
                max_pixels=max_pixels,
            )
            train_all(always(light(checked)), storage, cluster, fill_features=fill_features)

    return graph
