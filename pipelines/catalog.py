"""The pipelines by name. Free of kfp until one is built."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.config import Cluster

NAMES = ("compare_policies",)


class UnknownPipeline(ValueError):
    """No pipeline has this name."""


def build(name: str, cluster: Cluster) -> Any:
    """The graph `name`, with the pods that `cluster` asks for. Raises UnknownPipeline."""
    if name not in NAMES:
        raise UnknownPipeline(f"pipeline {name!r}: unknown; there are {', '.join(NAMES)}")
    return getattr(import_module(f"pipelines.{name}"), name)(cluster)
