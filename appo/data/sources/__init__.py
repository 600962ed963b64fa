"""Names of sources -> the modules that read them. A new source is one new file here and one line in SOURCES.

Each module has `read(recipe, folder) -> SourceData`; `folder` is where a source that makes its own videos may
write. See docs/data.md.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from appo.config import Recipe, RecipeError
from appo.data.sources.base import SourceData

SOURCES = {
    "jsonl": "generic",
    "key_moment": "key_moment",
    "nextgqa": "nextgqa",
    "perception_test": "perception_test",
    "seed_bench_r1": "seed_bench_r1",
    "video_r1": "video_r1",
}


def read_source(recipe: Recipe, folder: Path) -> SourceData:
    """Open the recipe's source. Raises RecipeError for an unknown name."""
    name = recipe.data.source
    if name not in SOURCES:
        raise RecipeError(f"data.source={name!r}: unknown; known are {', '.join(sorted(SOURCES))}")
    data: SourceData = import_module(f"appo.data.sources.{SOURCES[name]}").read(recipe, folder)
    return data
