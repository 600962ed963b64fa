"""The made sets and the models' stand-ins, once for all recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appo.config import Recipe
from tests.recipes.sets import MadeSet, make_all
from tests.recipes.stand_in import make_stand_in


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, MadeSet], Path]:
    """(source -> its made set, the folder of all benchmarks)."""
    return make_all(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path | None]:
    """The folder in place of a recipe's model, made when it is first asked for; None for a model made by the recipe."""
    folder, known = tmp_path_factory.mktemp("models"), {}

    def model(recipe: Recipe) -> Path | None:
        if recipe.model.path is None:
            return None
        which = recipe.model.path, recipe.data.template
        if which not in known:
            known[which] = make_stand_in(*which, folder / str(len(known)))
        return known[which]

    return model


@pytest.fixture(scope="session")
def some_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint where none is run: the first step asks that it be one."""
    from appo.config import Video
    from appo.training import tiny

    tokenizer = tiny.make_tokenizer(["a question"])
    folder = tmp_path_factory.mktemp("some_model")
    tiny.save(tiny.make_model(tokenizer, seed=0), tiny.make_processor(tokenizer, Video()), folder)
    return folder
