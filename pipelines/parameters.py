"""Parameters of the run form that every graph has, described once.

KFP shows a parameter's line of the docstring beside its field; `described` adds these lines to a graph's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from appo.plan import data_overrides

Graph = TypeVar("Graph", bound=Callable[..., Any])

COMMON = {
    "recipe": "Name of a shipped recipe (appo recipe list), or the text of one in YAML or JSON.",
    "storage": "Folder or s3:// prefix below which all files of the run lie.",
}
# What data_overrides takes.
DATA = {
    "quotas": 'Samples of each source, such as {"STAR": 5000, "CLEVRER": "all"}; {}: as the recipe says.',
    "data_seed": "Of the choice of samples and of the splits, 0 or more; -1: as the recipe says.",
    "num_frames": "Frames taken of each video, spread evenly over it; 0: as the recipe says.",
    "fps": "Frames taken of each second of a video, in place of num_frames; 0: as the recipe says.",
    "max_pixels": "Pixels that a frame is scaled down to, such as 50176 (224 x 224); 0: as the recipe says.",
}


def described(graph: Graph) -> Graph:
    """`graph` with the lines above added to the Args at the end of its docstring."""
    lines = [f"    {name}: {text}" for name, text in {**COMMON, **DATA}.items()]
    graph.__doc__ = "\n".join([inspect.cleandoc(graph.__doc__ or "Args:"), *lines])
    return graph


def overrides_of(given: Mapping[str, Any]) -> list[str]:
    """What a form's values for the data change in the recipe. Raises RecipeError as `data_overrides` does."""
    return data_overrides(**{name: given[name] for name in DATA if name in given})
