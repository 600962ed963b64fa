"""A recipe's name or path -> its values, those of the recipes that it extends merged in below.

Free of torch and of pydantic's errors: `appo.config` checks the values. A file may say `extends: NAME_OR_PATH`, or give
a list of them, later ones above earlier ones. Mappings merge key by key, everything else replaces, `null` clears. Every
value remembers the file that it stands in, so that a complaint names that file and not the one that was asked for.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml

from appo.errors import SettingError, one_line
from appo.sections import Recipe, Section

SHIPPED = resources.files("appo.recipes")
SUFFIXES = (".yaml", ".yml")
BASE = "base/"
# Of one recipe, and never of those that extend it.
OWN = ("name", "description")
# What names of recipes meant before there was one for each model.
RENAMED = {
    "video_r1_34k": "qwen2.5_vl_7b_video_r1_34k",
    "seed_bench_r1_6k": "qwen2.5_vl_7b_seed_bench_r1_6k",
    "perception_test_6k": "qwen2.5_vl_7b_perception_test_6k",
    "nextgqa_3k": "qwen2.5_vl_7b_nextgqa_3k",
}


class RecipeError(SettingError):
    """A recipe that cannot be run: the message names the file, the key, the value and the remedy."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return _yaml_names("")


def base_names() -> list[str]:
    """Names of the files that shipped recipes extend: `base/paper`."""
    return [BASE + name for name in _yaml_names("base")]


def _yaml_names(folder: str) -> list[str]:
    files = SHIPPED.joinpath(folder).iterdir() if folder else SHIPPED.iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


@dataclass
class Values:
    """A recipe's values before they are checked. origins: path of keys -> the file that gave what lies there."""

    tree: dict[str, Any]
    origin: str
    origins: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def origin_of(self, path: Sequence[Any]) -> str:
        """The file that the value at `path` stands in, or the nearest value around it."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(tuple(path[:length])):
                return found
        return self.origin


@dataclass(frozen=True)
class _Source:
    """A file. origin: how messages call it; place: what tells files apart; folder: where relative paths start."""

    origin: str
    place: str
    folder: Path
    text: str


def read_values(name_or_path: str) -> Values:
    """The values of a shipped recipe by name, or of a YAML file by path.

    Raises RecipeError for a name or file that is not there, text that is no mapping, and for `extends` that leads
    nowhere or back to where it came from.
    """
    path = Path(name_or_path)
    if path.suffix in SUFFIXES or path.is_file():
        kind = "is a folder, no recipe file" if path.is_dir() else "no such recipe file"
        return _resolved(_file(path, f"{path}: {kind}; name a .yaml file"), ())
    return _resolved(_shipped(name_or_path, f"recipe {name_or_path!r}"), ())


def parse_yaml(text: str, origin: str) -> Any:
    """What the text holds. Raises RecipeError with the line that is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin}: is not valid YAML: {one_line(error)}; mend it there") from error


def section_at(path: Sequence[Any]) -> type[Section] | None:
    """The section of a recipe at a path of keys; None for a value, and for a mapping with free keys."""
    section: type[Section] = Recipe
    for part in path:
        if part not in section.model_fields:
            return None
        annotation = section.model_fields[part].annotation
        kinds = [annotation, *get_args(annotation)]
        found = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        if found is None:
            return None
        section = found
    return section


def _file(path: Path, missing: str) -> _Source:
    if not path.is_file():
        raise RecipeError(missing)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason}); name a .yaml file") from error
    return _Source(str(path), str(path.resolve()), path.parent, text)


def _shipped(name: str, asked: str, *, parts: bool = False) -> _Source:
    """A shipped file by name. parts: those in `base/` too, which recipes are made of."""
    if name in RENAMED:
        other = RENAMED[name].replace("_7b_", "_3b_")
        raise RecipeError(f"{asked}: is named {RENAMED[name]} now; for the 3B model there is {other}")
    if name not in recipe_names() and not (parts and name in base_names()):
        part = BASE + name.removeprefix(BASE)
        if part in base_names():
            raise RecipeError(
                f"{asked}: is a part of recipes and not one itself; extend it in a file of your own with "
                f"`extends: {part}`, or choose one that `appo recipe list` shows"
            )
        close = difflib.get_close_matches(name, recipe_names(), n=3)
        near = f", similar are {', '.join(close)}" if close else ""
        raise RecipeError(f"{asked}: unknown{near}; `appo recipe list` shows all, or give a .yaml")
    file = SHIPPED.joinpath(f"{name}.yaml")
    return _Source(f"{name}.yaml", str(file), Path(str(file)).parent, file.read_text(encoding="utf-8"))


def _resolved(source: _Source, chain: tuple[_Source, ...]) -> Values:
    """The file's own values above those of all that it extends. chain: the files that led here."""
    if source.place in [one.place for one in chain]:
        circle = " -> ".join(one.origin for one in (*chain, source))
        raise RecipeError(f"{chain[0].origin}: extends itself: {circle}; take one of these `extends` out")
    own = _parsed(source)
    found = Values({}, source.origin)
    for reference in _references(own.pop("extends", None), source):
        below = _resolved(_extended(reference, source), (*chain, source))
        for key in OWN:
            below.tree.pop(key, None)
        _merge(found, below.tree, below)
    _merge(found, own, Values(own, source.origin))
    return found


def _parsed(source: _Source) -> dict[str, Any]:
    values = parse_yaml(source.text, source.origin) or {}
    if not isinstance(values, dict):
        raise RecipeError(f"{source.origin}: must be a mapping of sections, found {type(values).__name__}")
    return values


def _references(value: Any, source: _Source) -> list[str]:
    references = [] if value is None else value if isinstance(value, list) else [value]
    for reference in references:
        if not isinstance(reference, str) or not reference:
            raise RecipeError(
                f"{source.origin}: extends={value!r}: must be a recipe's name or path, or a list of them"
            )
    return references


def _extended(reference: str, source: _Source) -> _Source:
    asked = f"{source.origin}: extends={reference!r}"
    if reference.endswith(SUFFIXES):
        path = source.folder / Path(reference).expanduser()
        return _file(path, f"{asked}: no such file; a relative path starts at this file's own folder")
    return _shipped(reference, asked, parts=True)


def _merge(below: Values, above: Mapping[Any, Any], given: Values, path: tuple[Any, ...] = ()) -> None:
    """Lay `above`, which `given` holds at `path`, over what `below` has there."""
    tree = below.tree
    for part in path:
        tree = tree[part]
    for key, value in above.items():
        here = (*path, key)
        if isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            _merge(below, value, given, here)
            continue
        for known in [place for place in below.origins if place[: len(here)] == here]:
            del below.origins[known]
        if value is None and key in tree and not _may_be_null(here):
            del tree[key]  # at its default again
            continue
        tree[key] = copy.deepcopy(value)
        below.origins[here] = given.origin_of(here)
        below.origins |= {place: o for place, o in given.origins.items() if place[: len(here)] == here}


def _may_be_null(path: tuple[Any, ...]) -> bool:
    """Whether null is a value of this setting. A key of a free mapping (a quota, say) is taken out by it."""
    section = section_at(path[:-1])
    if section is None or path[-1] not in section.model_fields:
        return section is not None  # an unknown key is refused later, by its name
    return type(None) in get_args(section.model_fields[path[-1]].annotation)
