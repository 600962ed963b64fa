"""The recipe's benchmark names -> opened benchmarks with the frames of their videos."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appo.config import Recipe
from appo.evaluation.benchmarks import AnnotationError, Benchmark, benchmark_class

if TYPE_CHECKING:
    from appo.data.frames import FrameSource


@dataclass(frozen=True, slots=True)
class OpenSet:
    """template: of the prompts. digest: 16 hex digits over the items, in order."""

    benchmark: Benchmark
    frames: FrameSource
    template: str
    digest: str


def open_sets(recipe: Recipe, manifest_path: Path | None) -> list[OpenSet]:
    """Every benchmark of the recipe. Raises AnnotationError for what is missing or is not the benchmark's
    own.
    """
    sets = [_open(recipe, name, manifest_path) for name in recipe.evaluation.benchmarks]
    names = [opened.benchmark.name for opened in sets]
    if not names or len(set(names)) < len(names):
        raise AnnotationError(f"evaluation.benchmarks={list(names)}: name at least one, and each once")
    return sets


def _open(recipe: Recipe, name: str, manifest_path: Path | None) -> OpenSet:
    from appo.data.frames import DecodedFrames, open_frames
    from appo.data.manifest import read_manifest

    kind = benchmark_class(name)
    frames: FrameSource
    template: str
    if kind.name == "key_moment":
        if manifest_path is None:
            raise AnnotationError(
                "benchmark key_moment is a manifest's own test split: name it with --manifest"
            )
        benchmark = kind.load(Path(manifest_path), "test")
        frames, template = open_frames(read_manifest(manifest_path), recipe), recipe.data.template
    else:
        annotations = recipe.evaluation.annotations
        if annotations is None:
            raise AnnotationError(
                f"evaluation.annotations=null: {kind.name} needs its publisher's files; name their folder"
            )
        place = _of_benchmark(Path(annotations), kind.name)
        benchmark = kind.load(place, kind.splits[0])
        videos = (
            place
            if recipe.evaluation.videos is None
            else _of_benchmark(Path(recipe.evaluation.videos), kind.name)
        )
        frames, template = DecodedFrames(str(videos), recipe.video), kind.template
    if recipe.evaluation.limit is not None:
        benchmark.items = benchmark.items[: recipe.evaluation.limit]
    return OpenSet(benchmark, frames, template, _digest(benchmark))


def _of_benchmark(folder: Path, name: str) -> Path:
    """The benchmark's sub-folder where there is one, else the folder itself."""
    return folder / name if (folder / name).is_dir() else folder


def _digest(benchmark: Benchmark) -> str:
    digest = hashlib.sha256()
    for item in benchmark.items:
        digest.update(json.dumps(item.to_json(), sort_keys=True).encode())
    return digest.hexdigest()[:16]
