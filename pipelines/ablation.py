"""Variants of APPO's own settings -> one table: selection strategies (the paper's Table D), K1, K2, K3,
alpha.
"""

from typing import Any, Dict, List  # noqa: UP035 - KFP reads these annotations

from kfp import dsl

from appo.config import Cluster
from components import validate
from pipelines.blocks import CONFIG, closing, train_all
from pipelines.parameters import described
from pipelines.pods import always, light

# The paper's three strategies, and the ranges over which it calls K1 and K2 stable.
VARIANTS = [
    "soft: perception.strategy=soft",
    "hard: perception.strategy=hard",
    "all: perception.strategy=all",
    "k1-20: perception.k1=20",
    "k2-2: perception.k2=2",
    "k2-4: perception.k2=4",
    "k3-32: perception.k3=32",
    "k3-128: perception.k3=128",
    "alpha-1_0: perception.max_weight=1.0",
    "alpha-2_0: perception.max_weight=2.0",
]


def ablation(cluster: Cluster, *, fill_features: bool) -> dsl.base_component.BaseComponent:
    """The graph with the pods that `cluster` asks for; see `pipelines.catalog.build`."""

    @dsl.pipeline(name="ablation", display_name="Ablation of APPO's settings", pipeline_config=CONFIG)
    @described
    def graph(
        recipe: str = "demo",
        overrides: List[str] = ["algorithms=[appo]"],  # noqa: B006, UP006
        variants: List[str] = VARIANTS,  # noqa: UP006
        storage: str = "s3://appo/runs",
        quotas: Dict[str, Any] = {},  # noqa: B006, UP006
        data_seed: int = -1,
        num_frames: int = 0,
        fps: float = 0.0,
        max_pixels: int = 0,
    ):
        """Train every variant with every seed of the recipe, evaluate all of them, compare.

        Args:
            overrides: Values to change for all variants; names the algorithms whose variants are trained.
            variants: One "name: section.key=value ..." for each; data and model are the same for all.
        """
        with closing(storage, cluster):
            checked = validate(
                recipe=recipe,
                overrides=overrides,
                variants=variants,
                quotas=quotas,
                data_seed=data_seed,
                num_frames=num_frames,
                fps=fps,
                max_pixels=max_pixels,
            )
            train_all(
                always(light(checked)), storage, cluster, fill_features=fill_features, variants=variants
            )

    return graph
