"""The pipelines by name. Free of kfp until one is built."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.config import Cluster

NAMES = ("compare_policies", "train_and_evaluate", "ablation", "retrain")


class UnknownPipeline(ValueError):
    """No pipeline has this name."""


def build(name: str, cluster: Cluster) -> Any:
    """The graph `name`, with the pods that `cluster` asks for. Raises UnknownPipeline."""
    return getattr(_module(name), name)(cluster)


def choices(name: str) -> dict[str, list[str]]:
    """Parameters of pipeline `name` that take one of a few values."""
    return getattr(_module(name), "CHOICES", {})


def _module(name: str) -> Any:
    if name not in NAMES:
        raise UnknownPipeline(f"pipeline {name!r}: unknown; there are {', '.join(NAMES)}")
    return import_module(f"pipelines.{name}")
