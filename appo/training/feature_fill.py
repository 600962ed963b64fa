"""A manifest and a checkpoint -> a feature cache that training finds full: a pipeline step of its own.

Encoding needs one GPU and no policy; done once beforehand, no training of a comparison, whatever its seed and
algorithm, ever runs the vision tower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from appo.config import Recipe
from appo.data.frames import open_frames
from appo.data.manifest import Manifest
from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.modeling.checkpoints import check_model
from appo.modeling.feature_cache import open_cache
from appo.modeling.feature_files import nothing_to_fill
from appo.training.store import PromptStore


@dataclass(frozen=True, slots=True)
class Filled:
    """videos: prompts of different visual input. computed, found: features. revision: the tower's."""

    videos: int
    computed: int
    found: int
    revision: str


def fill(
    recipe: Recipe,
    manifest: Manifest,
    model_path: str,
    *,
    splits: Sequence[str] = ("train", "validation"),
    progress: bool = True,
) -> Filled:
    """Compute the features of every video of `splits` that `training.feature_cache_dir` does not hold yet.

    Raises SettingError where the recipe keeps no features, VideoError when frames cannot be had.
    """
    from appo.modeling.loading import load_policy, load_processor

    if reason := nothing_to_fill(recipe):
        raise SettingError(
            f"nothing to fill ({reason}): set training.feature_cache_dir to a folder or s3:// URI, "
            "training.feature_cache and model.freeze_vision to true"
        )
    check_model(model_path)
    model = load_policy(model_path, recipe.model)
    if _has_gpu():
        model = model.to("cuda")
    cache = open_cache(recipe, model)
    assert cache is not None  # nothing_to_fill gave no reason
    store = PromptStore(
        manifest.samples, open_frames(manifest, recipe), load_processor(model_path), recipe, cache=cache
    )
    samples = list(_each_video([sample for name in splits for sample in manifest.split(name)]))
    for sample in _shown(samples, progress):
        store.get(sample.id, model)
    counts = cache.counts
    return Filled(len(samples), counts.computed, counts.stored + counts.memory, cache.revision)


def _each_video(samples: Sequence[VideoSample]) -> Iterator[VideoSample]:
    """One sample for each different video and image; their other questions need the same features."""
    seen = set()
    for sample in samples:
        visual = (sample.video_sha256 or sample.video, sample.image)
        if visual not in seen:
            seen.add(visual)
            yield sample


def _shown(samples: Sequence[VideoSample], progress: bool) -> Iterator[VideoSample]:
    from tqdm import tqdm

    yield from tqdm(samples, desc="vision features", unit="video", disable=not progress)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
