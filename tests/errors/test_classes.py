"""Every error class of ours: for the user to read, or on a short list with the reason why not."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from appo.errors import UserError

ROOT = Path(__file__).parents[2]
# Name -> why nobody at a keyboard is to read it.
OTHERS = {
    "_Mismatch": "tells a retry that bytes were damaged; ends as StorageError",
    "CannotTell": "a check that does not apply; ends as `skipped`",
    "TrainingFailed": "processes ended by a defect: the traceback in it is to be seen",
}


def classes() -> Iterator[tuple[str, str, list[str]]]:
    """(module, class, names of its bases) of every class definition in the three packages."""
    for package in ("appo", "components", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    yield module, node.name, [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def error_classes() -> list[tuple[str, str]]:
    """Those that are exceptions, by following the names of bases through the packages."""
    found = list(classes())
    known = {name for name in dir(builtins) if isinstance(getattr(builtins, name), type)}
    known = {name for name in known if issubclass(getattr(builtins, name), BaseException)}
    size = 0
    while size != len(known):
        size = len(known)
        known |= {name for _, name, bases in found if known & set(bases)}
    return [(module, name) for module, name, bases in found if known & set(bases)]


def test_the_walk_finds_what_it_should() -> None:
    names = {name for _, name in error_classes()}
    assert {"RecipeError", "AnnotationError", "StepFailed", "TrainJobFailed", "_Mismatch"} <= names
    assert len(names) > 30
    assert set(OTHERS) <= names  # no reason is kept for a class that is gone


@pytest.mark.parametrize(("module", "name"), error_classes())
def test_every_error_class_is_for_the_user_or_says_why_not(module: str, name: str) -> None:
    if name in OTHERS:
        return
    kind = getattr(import_module(module), name)
    assert issubclass(kind, UserError), f"{module}.{name}: derive it from appo.errors.UserError"
    assert kind.status in (1, 2)


def test_plain_errors_are_raised_for_callers_mistakes_only() -> None:
    """A message that names a setting is for the user, so its class says so too."""
    settings = ("policy.", "training.", "perception.", "model.", "data.", "video.", "evaluation.", "cluster.")
    wrong = []
    for package in ("appo", "components", "pipelines"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                    continue
                called = ast.unparse(node.exc.func)
                text = ast.unparse(node.exc.args[0]) if node.exc.args else ""
                plain = called in ("ValueError", "RuntimeError", "FileNotFoundError", "OSError", "KeyError")
                if plain and text.lstrip("f'\"").startswith(settings):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {called}")
    # Pure functions of the mathematics check their arguments again, and no recipe gets there with such values; what a
    # section refuses reaches the user through pydantic, as a RecipeError.
    allowed = ("appo/perception/", "appo/sections.py")
    assert [line for line in wrong if not line.startswith(allowed)] == []
