"""The pipelines by name. Free of kfp until one is built."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from appo.errors import UserError
from appo.modeling.feature_files import nothing_to_fill
from appo.storage import is_s3

if TYPE_CHECKING:
    from appo.config import Recipe

NAMES = ("compare_policies", "train_and_evaluate", "ablation", "retrain")


class UnknownPipeline(UserError, ValueError):
    """No pipeline has this name."""


def build(name: str, recipe: Recipe) -> Any:
    """The graph `name`, with the pods that the recipe's cluster section asks for, and with a step that fills the
    feature cache where its trainings share one. Raises UnknownPipeline.
    """
    return getattr(_module(name), name)(recipe.cluster, fill_features=shares_features(recipe))


def shares_features(recipe: Recipe) -> bool:
    """Whether steps see the features that one of them stores: a pod's own folder is gone with the pod."""
    place = recipe.training.feature_cache_dir or ""
    return nothing_to_fill(recipe) is None and (recipe.cluster.local or is_s3(place))


def choices(name: str) -> dict[str, list[str]]:
    """Parameters of pipeline `name` that take one of a few values."""
    return getattr(_module(name), "CHOICES", {})


def _module(name: str) -> Any:
    if name not in NAMES:
        raise UnknownPipeline(f"pipeline {name!r}: unknown; there are {', '.join(NAMES)}")
    return import_module(f"pipelines.{name}")
