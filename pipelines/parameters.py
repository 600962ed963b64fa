"""Parameters of the run form that every graph has, described once, and what a person gives for them, read.

KFP shows a parameter's line of the docstring beside its field; `described` adds these lines to a graph's own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import yaml

from appo.errors import SettingError, one_line
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
    """What a form's values change in the recipe, as the first step applies them (components/validate.py).

    Raises RecipeError as `data_overrides` does.
    """
    made = [*given.get("overrides", ())]
    made += data_overrides(**{name: given[name] for name in DATA if name in given})
    made += [f"algorithms=[{given['algorithm']}]"] if given.get("algorithm") else []
    made += [f"training.seeds=[{given['seed']}]"] if given.get("seed", -1) >= 0 else []
    return made


def read_parameters(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words, values in YAML. Raises SettingError."""
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise SettingError(f"--parameter {word}: write it as NAME=VALUE")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingError(
                f"--parameter {word}: the value is not YAML: {one_line(error, 160)}; quote it"
            ) from error
    return given


def fitting(graph: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as KFP takes them: only the graph's own, each of its type, and `2` for a float as 2.0.

    Raises SettingError naming the parameter, its value and how it is written.
    """
    inputs = graph.component_spec.inputs
    if unknown := sorted(set(given) - set(inputs)):
        raise SettingError(
            f"--parameter {unknown[0]}: {graph.name} has none of this name; known are {', '.join(inputs)}"
        )
    typed = {name: _typed(name, value, str(inputs[name].type)) for name, value in given.items()}
    if not 0 <= typed.get("margin", 0) < math.inf:  # else noticed when everything is trained and evaluated
        raise SettingError(
            f"--parameter margin={typed['margin']!r}: must be 0 or more; write it as -P margin=0.01"
        )
    return typed


def _typed(name: str, value: Any, kind: str) -> Any:
    named, number = (
        f"--parameter {name}={value!r}",
        isinstance(value, int | float) and not isinstance(value, bool),
    )
    if "List" in kind:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return value
        raise SettingError(f'{named}: must be a list of texts; write it as -P \'{name}=["a", "b"]\'')
    if "Dict" in kind:
        if isinstance(value, dict):
            return value
        raise SettingError(f"{named}: must be an object; write it as -P '{name}={{KEY: VALUE}}'")
    if kind == "Integer" and not (number and isinstance(value, int)):
        raise SettingError(f"{named}: must be a whole number; write it as -P {name}=1")
    if kind == "Float":
        if number:
            return float(value)
        raise SettingError(f"{named}: must be a number; write it as -P {name}=0.5")
    if kind == "String" and not isinstance(value, str):
        raise SettingError(f"{named}: must be text; write it as -P '{name}=\"text\"'")
    return value
