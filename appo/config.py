"""A recipe (YAML) plus overrides -> one typed, validated `Recipe` that a whole run is made from.

Free of torch: `appo recipe show`, pipeline compilation and the first step of every pipeline read recipes.
Every mistake is refused here, with file, key, value and remedy, before a GPU is taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from appo.errors import SettingError, one_line
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


class RecipeError(SettingError):
    """A recipe that cannot be run: the message names the file, the key, the value and the remedy."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("appo.recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a YAML file by path, and apply `key.path=value` overrides (YAML
    values).

    Raises RecipeError naming file, key, value and remedy.
    """
    text, origin = _read(name_or_path)
    values = _yaml(text, origin) or {}
    if not isinstance(values, dict):
        raise RecipeError(f"{origin}: must be a mapping of sections, found {type(values).__name__}")
    for override in overrides:
        _override(values, override)
    return _validated(values, origin if not overrides else f"{origin} with {' '.join(overrides)}")


def parse_recipe(text: str) -> Recipe:
    """A recipe from the text (YAML, or JSON) that an earlier pipeline step handed over."""
    return _validated(_yaml(text, "resolved recipe"), "resolved recipe")


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: is not valid YAML: {one_line(error)}; mend it there") from error


def _read(name_or_path: str) -> tuple[str, str]:
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            is_folder = path.is_dir()
            raise RecipeError(
                f"{path}: {'is a folder, no recipe file' if is_folder else 'no such recipe file'}; name a .yaml file"
            )
        try:
            return path.read_text(encoding="utf-8"), str(path)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path}: is not UTF-8 text ({error.reason}); name a .yaml file") from error
    if name_or_path not in recipe_names():
        raise RecipeError(
            f"recipe {name_or_path!r}: unknown; shipped are {', '.join(recipe_names())}, or give a .yaml"
        )
    return (resources.files("appo.recipes") / f"{name_or_path}.yaml").read_text(
        encoding="utf-8"
    ), f"{name_or_path}.yaml"


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {override}: write it as section.key=value")
    *parents, last = key.strip().split(".")
    node = values
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


def _validated(values: dict[str, Any], origin: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(f"{origin}: {_explain(problem)}" for problem in error.errors())
        ) from error


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{key}={value!r}: unknown key; known here: {', '.join(_known_keys(problem['loc'][:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={value!r}: {message[0].lower()}{message[1:]}"


def _known_keys(path: Sequence[Any]) -> list[str]:
    section: Any = Recipe
    for part in path:
        annotation = section.model_fields[part].annotation
        section = next(
            t for t in [annotation, *getattr(annotation, "__args__", ())] if hasattr(t, "model_fields")
        )
    return list(section.model_fields)
