"""A recipe (YAML) plus overrides -> one typed, validated `Recipe` that a whole run is made from.

Free of torch: `appo recipe show`, pipeline compilation and the first step of every pipeline read recipes.
Every mistake is refused here, with file, key, value and remedy, before a GPU is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from appo.errors import one_line
from appo.recipe_files import RecipeError, Values, parse_yaml, read_values, recipe_names, section_at
from appo.sections import (
    Algorithm,
    Cluster,
    Data,
    Evaluation,
    Judge,
    KeyMoment,
    Lora,
    Model,
    Perception,
    Policy,
    Recipe,
    Section,
    Tracking,
    Training,
    Video,
    WarmStart,
)

__all__ = [
    "Algorithm",
    "Cluster",
    "Data",
    "Evaluation",
    "Judge",
    "KeyMoment",
    "Lora",
    "Model",
    "Perception",
    "Policy",
    "Recipe",
    "RecipeError",
    "Section",
    "Tracking",
    "Training",
    "Video",
    "WarmStart",
    "load_recipe",
    "parse_recipe",
    "recipe_names",
]


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path, with all that it extends, and apply `key.path=value`
    overrides (YAML values).

    Raises RecipeError naming file, key, value and remedy.
    """
    values = read_values(name_or_path)
    for override in overrides:
        _override(values, override)
    return _validated(values, f" with {' '.join(overrides)}" if overrides else "")


def parse_recipe(text: str) -> Recipe:
    """A recipe from the text (YAML, or JSON) that an earlier pipeline step handed over."""
    return _validated(Values(parse_yaml(text, "resolved recipe"), "resolved recipe"))


def _override(values: Values, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: write it as section.key=value")
    *parents, last = key.strip().split(".")
    node = values.tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, not a section")
        node = child
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {override}: the value is not valid YAML: {one_line(error, 160)}; quote it"
        ) from error
    # YAML 1.1 reads 1e-6 as a string; a number is meant.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # a word, as most strings are
            value = float(value)
    node[last] = value
    values.origins[*parents, last] = values.origin


def _validated(values: Values, changed: str = "") -> Recipe:
    """changed: how the overrides are told in a complaint."""
    try:
        return Recipe.model_validate(values.tree)
    except ValidationError as error:
        problems = [f"{values.origin_of(p['loc'])}{changed}: {_explain(p)}" for p in error.errors()]
        raise RecipeError("\n".join(problems)) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key}={value!r}: unknown key; known here: {', '.join(_known_keys(problem['loc'][:-1]))}"
    if problem["type"] == "missing":
        return f"{key}: is missing; every recipe gives it"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: Sequence[Any]) -> list[str]:
    section = section_at(path)
    return [] if section is None else list(section.model_fields)
