"""The shipped recipes -> the aligned table that `appo recipe list` prints."""

from __future__ import annotations

from appo.config import Cluster, Model, load_recipe, recipe_names

COLUMNS = ("recipe", "model", "data", "GPUs", "dtype", "what it is")


def recipe_table() -> str:
    """One line a recipe under a line of headings; columns are as wide as their longest entry."""
    recipes = [load_recipe(name) for name in recipe_names()]
    rows = [COLUMNS] + [
        (r.name, _model(r.model), r.data.source, _gpus(r.cluster), r.model.dtype, r.description)
        for r in recipes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _model(model: Model) -> str:
    if model.path is None:
        return "tiny, made here"
    return model.path.rstrip("/").rsplit("/", 1)[-1] + (" + LoRA" if model.lora else "")


def _gpus(cluster: Cluster) -> str:
    """`16 (2 x 8)`: all of them, and over how many nodes."""
    here = cluster.gpus_per_node
    if not here:
        return "none"
    return str(here) if cluster.nodes == 1 else f"{cluster.nodes * here} ({cluster.nodes} x {here})"
