"""A resolved recipe and a storage root -> where each step of a run finds and leaves its files.

Standard library and config only: the first step of every pipeline, the command line and the tests read it.
Names carry a digest of just the settings that made the files, so that two runs share a set or a warm start
exactly when they asked for the same one, and a changed setting never continues another setting's training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.config import Perception, Recipe, RecipeError, load_recipe
from appo.errors import ends_in_lines


@dataclass(frozen=True, slots=True)
class Training:
    """One training of a comparison. variant: its name in an ablation, empty otherwise."""

    algorithm: str
    seed: int
    variant: str = ""

    @property
    def name(self) -> str:
        label = f"{self.algorithm}.{self.variant}" if self.variant else self.algorithm
        return f"{label}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Locations (folders or s3:// prefixes) of one run's files below its storage root."""

    storage: str
    data: str
    base: str
    trainings: str
    evaluation: str
    report: str

    def training(self, training: Training) -> str:
        return f"{self.trainings}/{training.name}"


def resolve(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a shipped name, a path, or the text of a YAML or JSON mapping (what a pod is sent).

    Raises RecipeError naming origin, key, value and remedy.
    """
    is_text = "\n" in recipe.strip() or recipe.lstrip().startswith("{")
    return load_text(recipe, overrides) if is_text else load_recipe(recipe, overrides)


def load_text(text: str, overrides: Sequence[str]) -> Recipe:
    """A recipe given as YAML text, through the same door as a file."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        try:
            return load_recipe(str(path), overrides)
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(path), "recipe given as text")) from error


def trainings(recipe: Recipe) -> list[Training]:
    """Every algorithm with every seed; seeds outermost, so that two finished trainings are already a
    comparison.
    """
    return [Training(algorithm, seed) for seed in recipe.training.seeds for algorithm in recipe.algorithms]


def ablation(recipe: Recipe, variants: Sequence[str]) -> list[tuple[Training, Recipe]]:
    """Every variant with every seed, each with its recipe; a variant is `name: key=value key=value`.

    Only what a training reads may vary: data, video and model are the same for all, or they could not be
    compared. Raises RecipeError naming the variant.
    """
    made: dict[str, Recipe] = {}
    for variant in variants:
        name, colon, settings = variant.partition(":")
        name = name.strip()
        if not colon or not re.fullmatch(r"[\w-]+", name):
            raise RecipeError(
                f"variant {variant!r}: write it as name: section.key=value, the name without spaces"
            )
        if name in made:
            raise RecipeError(f"variant {name!r}: is given twice")
        changed = resolve(recipe.to_json(), settings.split())
        if layout(changed, "").base != layout(recipe, "").base:
            raise RecipeError(
                f"variant {variant!r}: changes the data or the model; vary policy, perception, training"
            )
        made[name] = changed
    return [
        (Training(algorithm, seed, name), changed)
        for seed in recipe.training.seeds
        for algorithm in recipe.algorithms
        for name, changed in made.items()
    ]


@ends_in_lines
def data_overrides(
    *,
    quotas: Mapping[str, Any] | None = None,
    data_seed: int = -1,
    num_frames: int = 0,
    fps: float = 0.0,
    max_pixels: int = 0,
) -> list[str]:
    """The data parameters of a pipeline's run form -> overrides of the recipe; defaults leave it as it is.

    Raises RecipeError naming parameter, value and remedy.
    """
    whole = {"data_seed": data_seed, "num_frames": num_frames, "max_pixels": max_pixels}
    for name, value in {**whole, "fps": fps}.items():
        keeps = -1 if name == "data_seed" else 0
        if isinstance(value, bool) or not isinstance(value, int if name in whole else int | float):
            raise RecipeError(f"{name}={value!r}: must be a {'whole ' if name in whole else ''}number")
        if not keeps <= value < float("inf"):
            raise RecipeError(f"{name}={value!r}: must be {keeps} (as the recipe says) or more")
    if num_frames and fps:
        raise RecipeError(f"num_frames={num_frames}, fps={fps!r}: give one of them, and 0 for the other")
    made = [f"data.quotas={json.dumps(_whole(quotas), ensure_ascii=False)}"] if quotas else []
    made += [f"data.seed={data_seed}"] if data_seed >= 0 else []
    made += [f"video.num_frames={num_frames}", "video.fps=null"] if num_frames else []
    made += [f"video.fps={fps}", "video.num_frames=null"] if fps else []
    made += [f"video.max_pixels={max_pixels}"] if max_pixels else []
    return made


def _whole(quotas: Mapping[str, Any]) -> dict[str, int | str]:
    """Quotas with counts as integers: a cluster's parameters know only floats."""
    remedy = 'write it as {"STAR": 5000, "CLEVRER": "all"}'
    if not isinstance(quotas, Mapping):
        raise RecipeError(f"quotas={quotas!r}: must be an object of counts by source; {remedy}")
    made: dict[str, int | str] = {}
    for source, count in quotas.items():
        number = isinstance(count, int | float) and not isinstance(count, bool)
        if count != "all" and not (number and count >= 0 and count == int(count)):
            raise RecipeError(f'quotas, {source}: {count!r} must be a count from 0 on, or "all"; {remedy}')
        made[source] = "all" if count == "all" else int(count)
    return made


def layout(recipe: Recipe, storage: str) -> Layout:
    """Where the steps of this recipe leave their files below `storage`."""
    root = storage.rstrip("/")
    values = recipe.model_dump(mode="json")
    data = {"data": _without(values["data"], "workers", "decode_timeout_s"), "video": values["video"]}
    base = {"model": values["model"], "data": data}
    training = {
        **base,
        "policy": _without(values["policy"], "algorithm"),
        "perception": values["perception"],
        "training": _without(values["training"], "seeds", "save_every"),
    }
    runs = f"{root}/{digest(training)}"
    return Layout(
        storage=root,
        data=f"{root}/data-{digest(data)}",
        base=f"{root}/base-{digest(base)}",
        trainings=f"{runs}/train",
        evaluation=f"{runs}/evaluation-{digest(values['evaluation'])}",
        report=f"{runs}/report",
    )


def assembly_recipe(recipe: Recipe) -> Recipe:
    """The recipe with everything at its default that assembly does not read: equal for runs that share a
    set.
    """
    return Recipe(
        name="assembly",
        data=recipe.data,
        video=recipe.video,
        model=recipe.model.model_copy(update={"path": "-", "warm_start": None}),
        perception=Perception(k2=1),
    )


def base_recipe(recipe: Recipe) -> Recipe:
    """The same for the step that makes or names the weights that training starts from."""
    return assembly_recipe(recipe).model_copy(update={"name": "base", "model": recipe.model})


def digest(values: Any) -> str:
    """First 10 hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def _without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
