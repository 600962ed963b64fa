"""The recipe's benchmark names -> opened benchmarks with the frames of their videos."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from appo.config import Recipe
from appo.data.schema import VideoSample
from appo.data.shards import encoding_in_words
from appo.evaluation.benchmarks import AnnotationError, Benchmark, benchmark_class

if TYPE_CHECKING:
    from appo.data.frames import FrameSource


@dataclass(frozen=True, slots=True)
class OpenSet:
    """template: of the prompts. digest: 16 hex digits over the items, in order. encoding: "jpeg, quality 95" where
    frames lost something on their way into shards, else "lossless"."""

    benchmark: Benchmark
    frames: FrameSource
    template: str
    digest: str
    encoding: str

    def filling(self, samples: Sequence[VideoSample]) -> AbstractContextManager[None]:
        """While inside, the samples' frames may be asked for: what is not stored yet is decoded beside."""
        from appo.data.filling import FilledFrames

        return self.frames.filling(samples) if isinstance(self.frames, FilledFrames) else nullcontext()


def open_sets(recipe: Recipe, manifest_path: Path | None) -> list[OpenSet]:
    """Every benchmark of the recipe. Raises AnnotationError for what is missing or is not the benchmark's
    own.
    """
    sets = [_open(recipe, name, manifest_path) for name in recipe.evaluation.benchmarks]
    names = [opened.benchmark.name for opened in sets]
    if not names or len(set(names)) < len(names):
        raise AnnotationError(f"evaluation.benchmarks={list(names)}: name at least one, and each once")
    return sets


def check_files_named(recipe: Recipe, manifest_path: Path | None) -> None:
    """Raise AnnotationError where a benchmark's files are not even named; opens nothing."""
    for name in (benchmark_class(name).name for name in recipe.evaluation.benchmarks):
        if name == "key_moment" and manifest_path is None:
            raise AnnotationError(
                "benchmark key_moment is a manifest's own test split: name it with --manifest"
            )
        if name != "key_moment" and recipe.evaluation.annotations is None:
            raise AnnotationError(
                f"evaluation.annotations=null: {name} needs its publisher's files; name their folder"
            )


def _open(recipe: Recipe, name: str, manifest_path: Path | None) -> OpenSet:
    from appo.data.frames import open_frames
    from appo.data.manifest import read_manifest

    kind = benchmark_class(name)
    check_files_named(recipe, manifest_path)
    frames: FrameSource
    template: str
    if kind.name == "key_moment":
        assert manifest_path is not None
        benchmark = kind.load(Path(manifest_path), "test")
        manifest = read_manifest(manifest_path)
        frames, template = open_frames(manifest, recipe), recipe.data.template
        encoding = str(manifest.header.get("encoding", "")) if manifest.frames is not None else ""
    else:
        place = _of_benchmark(Path(str(recipe.evaluation.annotations)), kind.name)
        benchmark = kind.load(place, kind.splits[0])
        videos = (
            place
            if recipe.evaluation.videos is None
            else _of_benchmark(Path(recipe.evaluation.videos), kind.name)
        )
        benchmark.find_videos(videos)
        frames, template = _frames_of(videos, recipe), _template(recipe, kind)
        encoding = encoding_in_words(recipe.data) if recipe.data.cache == "shards" else ""
    if recipe.evaluation.limit is not None:
        benchmark.items = benchmark.items[: recipe.evaluation.limit]
    lossy = encoding if encoding.startswith("jpeg") else "lossless"
    return OpenSet(benchmark, frames, template, _digest(benchmark), lossy)


def _template(recipe: Recipe, kind: type[Benchmark]) -> str:
    """The benchmark's own; a policy that was taught to write down what it sees first is asked to."""
    observes = recipe.data.template == "observation" and kind.template == "reasoning"
    return "observation" if observes else kind.template


def _frames_of(videos: Path, recipe: Recipe) -> FrameSource:
    """The frames of a benchmark's own videos: from shards that all evaluations share, unless `data.cache` is none."""
    from appo.data.assemble import shard_place
    from appo.data.filling import FilledFrames
    from appo.data.frames import DecodedFrames

    place, local = shard_place(recipe, videos)
    if place is None:
        return DecodedFrames(str(videos), recipe.video)
    if recipe.data.cache_dir is None and not os.access(videos, os.W_OK):
        raise AnnotationError(
            f"{videos}: cannot be written to, and decoded frames are kept beside the videos; "
            "set data.cache_dir, or data.cache=none"
        )
    return FilledFrames(str(videos), recipe.video, recipe.data, place=place, journal=local / "journal.jsonl")


def _of_benchmark(folder: Path, name: str) -> Path:
    """The benchmark's sub-folder where there is one, else the folder itself."""
    return folder / name if (folder / name).is_dir() else folder


def _digest(benchmark: Benchmark) -> str:
    digest = hashlib.sha256()
    for item in benchmark.items:
        digest.update(json.dumps(item.to_json(), sort_keys=True).encode())
    return digest.hexdigest()[:16]
