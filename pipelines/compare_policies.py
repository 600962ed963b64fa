"""GRPO, DAPO and APPO from the same weights, on the same data, with the same seeds -> one comparison.

`appo pipeline run` executes this very graph on one machine; `appo pipeline compile` turns it into a cluster's
YAML.
"""

from typing import List  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from appo.config import Cluster
from components import validate
from pipelines.blocks import CONFIG, closing, train_all
from pipelines.pods import always, light


def compare_policies(cluster: Cluster) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for."""

    @dsl.pipeline(name="compare-policies", display_name="Compare GRPO, DAPO and APPO", pipeline_config=CONFIG)
    def graph(recipe: str = "demo", overrides: List[str] = [], storage: str = "s3://appo/runs"):  # noqa: B006, UP006
        """Train every algorithm of the recipe with every seed, evaluate all of them, compare.

        Args:
            recipe: Name of a shipped recipe (appo recipe list), or the text of one in YAML or JSON.
            overrides: Values to change, such as ["training.learning_rate=1e-6", "training.seeds=[0, 1, 2]"].
            storage: Folder or s3:// prefix below which all files of the run lie.
        """
        with closing(storage, cluster):
            checked = validate(recipe=recipe, overrides=overrides)
            train_all(always(light(checked)), storage, cluster)

    return graph
