"""Features filled beforehand are what training finds, under any bound, and training on them is the same."""

from __future__ import annotations

import pytest
import torch

from appo.data.frames import open_frames
from appo.data.manifest import read_manifest
from appo.modeling import feature_cache
from appo.modeling.loading import load_policy, load_processor
from appo.training.feature_fill import fill
from appo.training.store import PromptStore
from tests.training.conftest import Bench, largest_difference


def store_of(bench: Bench, *overrides: str):
    recipe, manifest = bench.recipe(*overrides), read_manifest(bench.manifest)
    model = load_policy(str(bench.model), recipe.model)
    cache = feature_cache.open_cache(recipe, model)
    frames, processor = open_frames(manifest, recipe), load_processor(str(bench.model))
    return PromptStore(manifest.samples, frames, processor, recipe, cache=cache), cache, model, manifest


def test_a_filled_cache_is_all_that_training_needs(bench: Bench, monkeypatch):
    place = f"training.feature_cache_dir={bench.folder / 'features'}"
    manifest = read_manifest(bench.manifest)
    first = fill(bench.recipe(place), manifest, str(bench.model), progress=False)
    videos = {s.video_sha256 for name in ("train", "validation") for s in manifest.split(name)}
    assert (first.videos, first.computed, first.found) == (len(videos), len(videos), 0)
    again = fill(bench.recipe(place), manifest, str(bench.model), progress=False)
    assert (again.computed, again.found, again.revision) == (0, len(videos), first.revision)

    bench.train("appo", name="without")

    def never(*_):
        raise AssertionError("the tower ran, although every feature is stored")

    monkeypatch.setattr(feature_cache.vision_features, "encode", never)
    summary = bench.train("appo", place, name="with")
    assert any("kept in memory and" in part for part in summary.active_parts)
    assert largest_difference(bench.weights("with"), bench.weights("without")) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.feature_cache_memory_gib=1e-9",),
        ("training.feature_cache_memory_gib=1e-9", "DIR"),
        ("training.feature_cache=false",),
    ],
)
def test_prompts_are_the_same_under_any_bound(bench: Bench, overrides):
    overrides = [f"training.feature_cache_dir={bench.folder}" if o == "DIR" else o for o in overrides]
    store, cache, model, manifest = store_of(bench, *overrides)
    roomy, _, _, _ = store_of(bench)
    ids = [sample.id for sample in manifest.split("train")[:6]]
    for sample_id in ids + ids[::-1]:
        found, expected = store.get(sample_id, model), roomy.get(sample_id, model)
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.positions, expected.positions)
        if cache is None:
            assert found.video.features is None
            assert len(found.video.pixels)
        else:
            assert torch.equal(found.video.features, expected.video.features)
    if cache is not None and len(overrides) == 2:
        assert cache.counts.computed == len(ids)  # the second time from the folder


def test_filling_what_keeps_nothing_is_refused(bench: Bench):
    manifest = read_manifest(bench.manifest)
    with pytest.raises(ValueError, match=r"features would stay in memory.*name a folder"):
        fill(bench.recipe(), manifest, str(bench.model))
    trained = bench.recipe("model.freeze_vision=false", f"training.feature_cache_dir={bench.folder}")
    with pytest.raises(ValueError, match=r"the tower trains.*freeze"):
        fill(trained, manifest, str(bench.model))
