"""Features filled beforehand are what training finds, under any bound, and training on them is the same."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
from typer.testing import CliRunner

from appo import steps
from appo.cli import app
from appo.config import Video
from appo.data.frames import DecodedFrames, ShardFrames, open_frames
from appo.data.manifest import read_manifest
from appo.data.video import VideoError
from appo.modeling import feature_cache
from appo.modeling.inputs import PromptInputs, Vision, build_inputs
from appo.modeling.loading import load_policy, load_processor
from appo.modeling.vllm_inputs import content_key
from appo.training.feature_fill import fill
from appo.training.store import PromptStore
from tests.modeling import models
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
        raise AssertionError("the tower ran or a frame was read, although every feature is stored")

    monkeypatch.setattr(feature_cache.vision_features, "encode", never)
    monkeypatch.setattr(ShardFrames, "load", never)
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


def assert_equal(found: PromptInputs, expected: PromptInputs) -> None:
    """Everything but pixels, of which both have none, and their empty tensor's width."""
    for name in (field.name for field in fields(PromptInputs)):
        ours, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(theirs, Vision):
            assert ours.key == theirs.key
            assert torch.equal(ours.grid_thw, theirs.grid_thw)
            assert torch.equal(ours.features, theirs.features)
            assert len(ours.pixels) == len(theirs.pixels) == 0
        elif isinstance(theirs, torch.Tensor):
            assert torch.equal(ours, theirs), name
        else:
            assert ours == theirs, name


@pytest.fixture
def film(bench: Bench, tmp_path):
    """A folder with a video and an image, a sample of both with their hashes, and stores that decode them."""
    manifest = read_manifest(bench.manifest)
    sample = manifest.split("train")[0]
    (tmp_path / "root").mkdir()
    shutil.copy(manifest.locate(sample), tmp_path / "root" / "film.mp4")
    Image.linear_gradient("L").resize((56, 28)).save(tmp_path / "root" / "still.png")
    hashes = {
        n: hashlib.sha256((tmp_path / "root" / n).read_bytes()).hexdigest() for n in ("film.mp4", "still.png")
    }
    sample = replace(
        sample,
        video="film.mp4",
        image="still.png",
        video_sha256=hashes["film.mp4"],
        extra={"image_sha256": hashes["still.png"]},
    )
    recipe = bench.recipe(f"training.feature_cache_dir={tmp_path / 'features'}")
    model, processor = load_policy(str(bench.model), recipe.model), load_processor(str(bench.model))

    def prompt(sample, *overrides: str, processor=processor):
        settings = bench.recipe(f"training.feature_cache_dir={tmp_path / 'features'}", *overrides)
        cache = feature_cache.open_cache(settings, model)
        frames = DecodedFrames(str(tmp_path / "root"), settings.video)
        store = PromptStore([sample], frames, processor, settings, cache=cache)
        return store.get(sample.id, model), cache.counts

    prompt.sample, prompt.root, prompt.processor = sample, tmp_path / "root", processor
    return prompt


@pytest.mark.parametrize("template", ["bare", "grounding"])
def test_a_named_hit_reads_no_file_and_gives_the_same_prompt(film, template):
    template = f"data.template={template}"
    expected, counts = film(film.sample, template)
    assert (counts.computed, counts.stored) == (2, 0)
    shutil.rmtree(film.root)
    found, counts = film(film.sample, template)
    assert (counts.computed, counts.stored) == (0, 2)
    assert_equal(found, expected)
    assert content_key("video", found.video, found) == content_key("video", expected.video, expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_known_grids_stand_for_pixels_in_every_family(film, family):
    model, ours = models.build(family), film.processor
    kind = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor, "qwen3_vl": Qwen3VLProcessor}[
        family
    ]
    parts = {"tokenizer": ours.tokenizer, "chat_template": ours.chat_template}
    processor = kind(image_processor=ours.image_processor, video_processor=ours.video_processor, **parts)
    source = DecodedFrames(str(film.root), Video(num_frames=8))
    video, image = source.load(film.sample), source.image(film.sample)
    expected = build_inputs(processor, model, film.sample, video, image, template="bare")
    blank, dot = replace(video, frames=video.frames[:, :0, :0]), image.resize((1, 1))
    grids = {"video": expected.video.grid_thw, "image": expected.image.grid_thw}
    found = build_inputs(processor, model, film.sample, blank, dot, template="bare", grids=grids)
    for kind in ("video", "image"):
        assert len(getattr(found, kind).pixels) == 0
        # What a cache adds to both
        found, expected = (
            replace(p, **{kind: Vision(torch.empty(0), getattr(p, kind).grid_thw, torch.empty(0))})
            for p in (found, expected)
        )
    assert_equal(found, expected)


def test_what_has_no_hash_goes_by_its_pixels(film):
    expected, _ = film(film.sample)
    nameless = replace(film.sample, video_sha256=None)
    first, counts = film(nameless)
    assert (counts.computed, counts.stored) == (1, 1)
    assert torch.equal(first.video.features, expected.video.features)
    assert first.video.key != expected.video.key
    _, counts = film(nameless)
    assert (counts.computed, counts.stored) == (0, 2)


def test_other_sampling_and_scaling_have_other_names(film):
    expected, _ = film(film.sample)
    fewer, counts = film(film.sample, "video.num_frames=8")
    assert counts.computed == 2
    assert fewer.num_frames == 4
    other = load_processor(str(film.processor.tokenizer.name_or_path))
    other.video_processor.image_mean = [0.0, 0.0, 0.0]
    scaled, counts = film(film.sample, processor=other)
    assert counts.computed >= 1
    assert not torch.equal(scaled.video.features, expected.video.features)


def test_a_file_that_is_not_the_manifests_is_refused_before_it_takes_its_name(film):
    with (film.root / "film.mp4").open("ab") as file:
        file.write(b"more")
    with pytest.raises(VideoError, match=r"film\.mp4: changed since the set was assembled.*assemble again"):
        film(film.sample)


def test_the_step_fills_what_the_recipe_shares_and_says_why_not(bench: Bench):
    given = {"manifest": str(bench.manifest), "model": str(bench.model)}
    place = f"training.feature_cache_dir={bench.folder / 'features'}"
    done = steps.features(bench.recipe(place), **given)
    assert done.location == str(bench.folder / "features")
    assert done.metrics["computed"] == done.metrics["videos"] > 0
    done = steps.features(bench.recipe(place, "training.learning_rate=1e-4"), **given)
    assert done.metrics["computed"] == 0
    assert "tower trains" in steps.features(bench.recipe(place, "model.freeze_vision=false"), **given).text


def test_a_step_with_nothing_to_fill_loads_no_torch():
    code = (
        "import sys; from appo import steps; from appo.config import load_recipe;"
        "print(steps.features(load_recipe('demo'), manifest='', model='').text, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (
        said.splitlines()[-1] == "nothing to fill: training.feature_cache_dir=null: kept in memory only False"
    )


def test_the_command_says_what_it_found(bench: Bench):
    given = ["--recipe", "demo", "--manifest", str(bench.manifest), "--model", str(bench.model)]
    place = bench.folder / "features"
    for found in (
        r"features: (\d+) computed, 0 found, of \1 videos",
        r"features: 0 computed, (\d+) found, of \1",
    ):
        result = CliRunner().invoke(
            app, ["data", "features", *given, "--set", f"training.feature_cache_dir={place}"]
        )
        assert re.search(found, result.output), result.output


def test_filling_what_keeps_nothing_is_refused(bench: Bench):
    manifest = read_manifest(bench.manifest)
    with pytest.raises(ValueError, match=r"feature_cache_dir=null: kept in memory only.*to a folder"):
        fill(bench.recipe(), manifest, str(bench.model))
    trained = bench.recipe("model.freeze_vision=false", f"training.feature_cache_dir={bench.folder}")
    with pytest.raises(ValueError, match=r"the tower trains.*model\.freeze_vision"):
        fill(trained, manifest, str(bench.model))
