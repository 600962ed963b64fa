"""What a test of a shipped recipe may replace, in one list; everything else runs as shipped.

Sizes (of the model, which is a folder: its widths, depth and vocabulary; of the data: prompts; of the run: steps and
processes) and places (of model, records, videos; the cluster, which is not there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.config import Recipe
from tests.recipes.sets import MadeSet

STEPS, PROCESSES = 2, 2


@dataclass(frozen=True)
class Allowed:
    """why: which size or place it is. holds: whether (shipped value, test's value) only makes it smaller."""

    why: str
    holds: Callable[[Any, Any], bool] = lambda shipped, tested: True


def _fewer(shipped: int, tested: int) -> bool:
    return 1 <= tested <= shipped


def _same_quotas(shipped: Mapping[str, Any], tested: Mapping[str, Any]) -> bool:
    """The same sources; all stays all, a count gets smaller."""
    if shipped.keys() != tested.keys():
        return False
    return all(
        tested[name] == "all" if count == "all" else tested[name] != "all" and _fewer(count, tested[name])
        for name, count in shipped.items()
    )


# Setting -> why it may differ. A setting that is no key here must be the shipped one's.
REPLACEABLE: Mapping[str, Allowed] = {
    "cluster": Allowed("cluster"),
    "data.annotations": Allowed("place of the records"),
    "data.fingerprint": Allowed("place of the records: their digest, which the first step fills in"),
    "data.key_moment.easy_train": Allowed("number of prompts", _fewer),
    "data.key_moment.test": Allowed("number of prompts", _fewer),
    "data.key_moment.train": Allowed("number of prompts", _fewer),
    "data.key_moment.validation": Allowed("number of prompts", _fewer),
    "data.quotas": Allowed("number of prompts, of the same sources", _same_quotas),
    "data.root": Allowed("place of the videos"),
    "data.workers": Allowed("data.workers"),
    "evaluation.annotations": Allowed("place of the records"),
    "evaluation.data_parallel": Allowed("number of processes", _fewer),
    "evaluation.videos": Allowed("place of the videos"),
    "model.path": Allowed("place of the model: widths, depth and vocabulary are the folder's"),
    "model.warm_start.steps": Allowed("number of steps", _fewer),
    "training.max_steps": Allowed("number of steps", lambda shipped, tested: tested >= 1),
    "training.prompts_per_step": Allowed("number of prompts", _fewer),
}


def replacements(
    recipe: Recipe, *, made: MadeSet | None, benchmarks: Path, model: Path | None
) -> tuple[str, ...]:
    """The overrides under which a shipped recipe runs on two cores.

    made: in place of the recipe's records; None for a set that the recipe makes itself. model: a folder in place of
    `model.path`; None for a recipe that makes its model.
    """
    shipped, tested = processes_of(recipe), min(PROCESSES, processes_of(recipe))
    values: dict[str, Any] = {
        "cluster": "{gpus_per_node: 0}",
        "data.workers": 2,
        "evaluation.annotations": benchmarks,
        "evaluation.data_parallel": min(PROCESSES, recipe.evaluation.data_parallel),
        "training.max_steps": STEPS,
        # As many groups a process and pass as in the shipped run.
        "training.prompts_per_step": recipe.training.prompts_per_step * tested // shipped,
    }
    if made is not None:
        values |= {"data.annotations": made.annotations, "data.root": made.root}
    if model is not None:
        values["model.path"] = model
    if recipe.model.warm_start is not None:
        values["model.warm_start.steps"] = 10
    if recipe.data.source == "key_moment":
        sizes = {"train": 16, "validation": 4, "test": 8, "easy_train": 32}
        values |= {f"data.key_moment.{name}": size for name, size in sizes.items()}
    if counts := {name: 3 for name, count in recipe.data.quotas.items() if count != "all"}:
        values["data.quotas"] = {**recipe.data.quotas, **counts}
    return tuple(f"{key}={value}" for key, value in values.items())


def processes_of(recipe: Recipe) -> int:
    """Of a training; on a machine without a GPU one."""
    return max(1, recipe.cluster.nodes * recipe.cluster.gpus_per_node)


def differing(shipped: Recipe, tested: Recipe) -> dict[str, tuple[Any, Any]]:
    """Setting -> (shipped, tested) of every setting that is not the shipped one's."""
    found: dict[str, tuple[Any, Any]] = {}

    def walk(path: str, one: Any, other: Any) -> None:
        if one == other:
            return
        whole = path in REPLACEABLE or not (isinstance(one, dict) and isinstance(other, dict))
        if whole or one.keys() != other.keys():
            found[path] = (one, other)
            return
        for key in one:
            walk(f"{path}.{key}" if path else str(key), one[key], other[key])

    walk("", shipped.model_dump(mode="json"), tested.model_dump(mode="json"))
    return found


def outside(shipped: Recipe, tested: Recipe) -> list[str]:
    """The differences that no test may make, in words; empty where a test runs the recipe as shipped."""
    return [
        f"{path}: shipped {one!r}, tested {other!r}"
        for path, (one, other) in differing(shipped, tested).items()
        if path not in REPLACEABLE or not REPLACEABLE[path].holds(one, other)
    ]


def told(shipped: Recipe, tested: Recipe) -> str:
    """What was replaced, a line each, as a test prints it."""
    lines = [f"{shipped.name}: replaced in this test, everything else is as shipped"]
    for path, (one, other) in differing(shipped, tested).items():
        why = REPLACEABLE[path].why if path in REPLACEABLE else "NOT ALLOWED"
        lines.append(f"  {path:<28} {_short(one)} -> {_short(other)}   ({why})")
    return "\n".join(lines)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}"
