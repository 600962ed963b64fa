"""Every test and command that docs/guarantees.md names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "guarantees.md"


def rows() -> list[tuple[str, str]]:
    """(promise, what shows it) of every row of the page's tables."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(cells) == 2 and cells[0] not in ("promise", "---"):
            found.append((cells[0], cells[1]))
    return found


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_the_page_has_promises() -> None:
    assert len(rows()) > 30
    assert len({promise for promise, _ in rows()}) == len(rows())


@pytest.mark.parametrize(("promise", "shown"), rows(), ids=lambda text: text[:50])
def test_what_shows_a_promise_is_there(promise: str, shown: str) -> None:
    assert shown.startswith("the same") or named(shown), promise
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in named(shown):
        if "::" in name:
            path, _, test = name.partition("::")
            assert test in names_in(path), name
        elif name.startswith("make "):
            assert re.search(rf"^{name.split()[1]}:", makefile, re.MULTILINE), name
        else:
            module = re.match(r"python -m ([\w.]+)", name)
            assert module, f"{name}: neither a test nor a command"
            assert (ROOT / f"{module[1].replace('.', '/')}.py").is_file() or (
                ROOT / module[1].replace(".", "/") / "__main__.py"
            ).is_file(), name


@pytest.mark.parametrize(("promise", "shown"), rows(), ids=lambda text: text[:50])
def test_long_tests_are_marked_as_such(promise: str, shown: str) -> None:
    """Who reads the page knows what `make test` alone shows."""
    for name, after in re.findall(r"`([^`]+::[^`]+)`( \(\*long\*\))?", shown):
        path, _, test = name.partition("::")
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        node = next(
            n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == test
        )
        is_long = any(isinstance(one, ast.Name) and one.id == "long" for one in node.decorator_list)
        assert is_long == bool(after), f"{name} in {promise!r}"
