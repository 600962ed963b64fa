"""The synthetic key-moment set of the demo, made here and read back like any other."""

from __future__ import annotations

from pathlib import Path

from appo.config import Recipe
from appo.data.sources.base import SourceData

NAMES = ("key_moment",)

READS_RECORDS = False  # it makes them


def read(recipe: Recipe, folder: Path) -> SourceData:
    """Write the videos into `folder`. Equal settings and seed give equal files, so writing again changes
    nothing.
    """
    from appo.data.synthetic import make_key_moment

    samples = make_key_moment(recipe.data.key_moment, seed=recipe.data.seed, folder=folder)
    return SourceData(samples, str(folder), {})
