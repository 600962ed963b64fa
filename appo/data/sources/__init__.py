"""Names of sources -> the modules that read them. A new source is one new file here and one line in SOURCES.

Each module has `read(recipe, folder) -> SourceData`; `folder` is where a source that makes its own videos may
write. NAMES, where a module has it, are the sources that its publisher's samples come from. See docs/data.md.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from appo.config import Recipe, RecipeError
from appo.data.schema import VideoSample
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
    data: SourceData = _module(recipe).read(recipe, folder)
    return data


def reads_records(recipe: Recipe) -> bool:
    """Whether the source reads a publisher's records, and does not make its own. Raises RecipeError as above."""
    return bool(getattr(_module(recipe), "READS_RECORDS", True))


def check_names(recipe: Recipe) -> None:
    """Refuse `data.quotas` and `data.problem_types` of a source that no sample comes from.

    Names that the publisher does not know are looked for in the records, which may be someone's own. Raises
    RecipeError naming the setting, the source and those there are.
    """
    wanted = {*recipe.data.quotas, *recipe.data.problem_types}
    known = set(getattr(_module(recipe), "NAMES", ()))
    if wanted <= known or (recipe.data.annotations is None and not known):
        return
    if recipe.data.annotations is not None:
        known |= {row.source for row in read_source(recipe, Path()).rows if isinstance(row, VideoSample)}
    for setting in ("quotas", "problem_types"):
        for name in sorted(set(getattr(recipe.data, setting)) - known):
            raise RecipeError(
                f"data.{setting}, {name}: no sample comes from this source; there are {', '.join(sorted(known))}"
            )


def _module(recipe: Recipe) -> ModuleType:
    name = recipe.data.source
    if name not in SOURCES:
        raise RecipeError(f"data.source={name!r}: unknown; known are {', '.join(sorted(SOURCES))}")
    return import_module(f"appo.data.sources.{SOURCES[name]}")
