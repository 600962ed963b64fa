"""Soak: whatever a recipe's settings are set to, a command ends as it says, in a few lines and without a traceback."""

from __future__ import annotations

import gc
import os
import random
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from appo.config import Recipe, recipe_names
from appo.errors import LINES
from tests.errors.conftest import answer
from tests.soak.drawn import drawn
from tests.tiers import soak

# Right now and then, and wrong in all the ways that YAML offers.
VALUES = (
    *("0", "-1", "1", "2", "3", "7", "64", "1e9", "0.5", "1e-6", "1e400", "9" * 400, ".nan", ".inf", "-.inf", "0x1F"),
    *("true", "null", "[]", "{}", "''", "x", "[1, 2]", "{a: 1}", "[[1]]", "{1: 2}", "[null]", "!!binary aGVsbG8="),
    *("s3://bucket/key", "s3://", "/nowhere", "/dev/null", "~/x", "OWNER/NAME", "OWNER/NAME@x", "http://127.0.0.1:9"),
    *("\u00e9", "2026-01-01", "a: b", "{{x}}", "a" * 5000, '"\\0"', '"\\ud800"', '"\\n\\n"', "&a [*a]", "'", "[", "*"),
    *("float32", "bfloat16", "fsdp2", "zero3", "ddp", "vllm_colocate", "appo", "[appo]", "[grpo, dapo]", "key_moment"),
)  # fmt: skip
# command -> its words after the recipe, and the statuses that it may end with.
COMMANDS = {
    "validate": ((), (0, 2)),
    "plan": (("--gpus", "2", "--gpu-memory", "24"), (0, 2, 3)),
    "recipe show": ((), (0, 2)),
}


def settings(section: type[BaseModel], path: str = "") -> list[str]:
    """Every setting that a recipe may name, those of sections that are null by default among them."""
    found = []
    for name, field in section.model_fields.items():
        whole = f"{path}.{name}" if path else name
        found.append(whole)
        for kind in (field.annotation, *typing.get_args(field.annotation)):
            if (
                isinstance(kind, type)
                and not isinstance(kind, types.GenericAlias)
                and issubclass(kind, BaseModel)
            ):
                found += settings(kind, whole)
    return found


def override(draw: random.Random, known: list[str]) -> str:
    name = draw.choice(known)
    if draw.random() < 0.1:  # misspelt
        at = draw.randrange(len(name))
        name = name[:at] + draw.choice(("", ".", "=", "x", " ")) + name[at + 1 :]
    if draw.random() < 0.05:
        name += draw.choice((".x", ".0", "."))
    return f"{name}={draw.choice(VALUES)}"


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder; nobody's store, hub or server is asked."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "MLFLOW_", "KFP_", "HF_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@soak
@pytest.mark.slow
@pytest.mark.timeout(0)
def test_overrides(alone: Path) -> None:
    known = settings(Recipe)
    assert "model.lora.rank" in known  # of a section that is null in most recipes
    for draw in drawn("test_overrides"):
        command = draw.choice(("validate", "validate", *COMMANDS))
        more, statuses = COMMANDS[command]
        given = [override(draw, known) for _ in range(draw.choice((1, 1, 1, 2, 3)))]
        words = [*command.split(), draw.choice(recipe_names()), *more]
        print(f"  {words}  {[text if len(text) < 99 else text[:99] + '...' for text in given]}", flush=True)
        found = answer(*words, *(word for text in given for word in ("--set", text)))
        print(f"  status {found.status}: {(found.lines or [''])[0][:150]!r}", flush=True)
        assert found.error is None, (words, given, found.error)
        assert found.status in statuses, (words, given, found)
        assert "Traceback" not in found.text + found.output, (words, given)
        if found.status == 2:
            assert 1 <= len(found.lines) <= LINES, (words, given, found.lines)
        assert not list(alone.iterdir()), (words, given, "a look wrote something")
        gc.collect()
