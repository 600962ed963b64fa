"""The warm start: what it shows keeps the format and is right, its loss is the plain one, its folder can be used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from appo.config import Recipe, Video, load_recipe
from appo.data.manifest import ManifestError, write_manifest
from appo.data.schema import VideoSample
from appo.data.synthetic import make_key_moment
from appo.data.video import VideoFrames
from appo.modeling.inputs import build_inputs, vision_kwargs
from appo.modeling.loading import prepare
from appo.rewards.accuracy import accuracy_reward
from appo.rewards.format import format_reward
from appo.training import tiny
from appo.training.warm_start import _batches, _in_words, _loss, demonstration, warm_start

CHOICE = VideoSample(
    "c", "test", "multiple choice", "Which?", "B", ("red", "green"), video="v.mp4", key_times=((1.0, 2.5),)
)
NUMBER = replace(CHOICE, id="n", problem_type="numerical", answer="42", options=(), key_times=())


@pytest.mark.parametrize("template", ["reasoning", "bare", "grounding", "observation"])
@pytest.mark.parametrize("sample", [CHOICE, NUMBER], ids=["choice", "number"])
def test_a_demonstration_earns_every_reward(template: str, sample: VideoSample) -> None:
    text = demonstration(sample, template)
    assert accuracy_reward(text, sample) == 1.0
    assert format_reward(text, template=template) == 1.0


def test_every_example_comes_once_before_any_comes_again() -> None:
    batches = _batches(10, 4, seed=0)
    drawn = [index for _ in range(15) for index in next(batches)]
    for start in range(0, 60, 10):
        assert sorted(drawn[start : start + 10]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    other = _batches(10, 4, seed=0)
    assert [next(other) for _ in range(3)] == [drawn[0:4], drawn[4:8], drawn[8:12]]


def test_loss_of_a_padded_batch_is_the_mean_over_its_target_tokens() -> None:
    """Against one unpadded forward per example with every row's logits: other lengths, other frame sizes."""
    samples = [CHOICE, replace(NUMBER, question="How many of them are there in all, would you say?")]
    tokenizer = tiny.make_tokenizer(["Which?"])
    processor = tiny.make_processor(tokenizer, Video(num_frames=4, max_pixels=224 * 224))
    model = prepare(tiny.make_model(tokenizer, seed=0), freeze_vision=False)
    examples = []
    for number, (sample, side) in enumerate(zip(samples, (28, 56), strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (4, side, side, 3), dtype=np.uint8)
        frames = VideoFrames(pixels, np.arange(4.0), (0, 1, 2, 3), 1.0, 4.0, 4)
        prompt = build_inputs(processor, model, sample, frames, None, template="bare")
        target = torch.tensor(tokenizer(demonstration(sample, "bare"))["input_ids"])
        examples.append((prompt, target))
    total = torch.zeros(())
    for prompt, target in examples:
        following = int(prompt.positions.max()) + 1 + torch.arange(len(target))
        logits = model(
            input_ids=torch.cat([prompt.ids, target])[None],
            position_ids=torch.cat([prompt.positions, following.expand(3, -1)], dim=1)[:, None],
            **vision_kwargs([prompt], model, torch.device("cpu")),
        ).logits[0, len(prompt.ids) - 1 : -1]
        total = total - logits.log_softmax(-1)[torch.arange(len(target)), target].sum()
    expected = total / sum(len(target) for _, target in examples)
    # float32 through four layers, once with a mask and once without
    assert _loss(model, examples, tokenizer.pad_token_id).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm")
    recipe = load_recipe("demo")
    settings = recipe.data.key_moment.model_copy(
        update={"easy_train": 24, "train": 1, "validation": 4, "test": 1}
    )
    samples = make_key_moment(settings, seed=0, folder=folder)
    path = folder / "manifest.jsonl"
    write_manifest(path, samples, root=".", video=recipe.video.model_dump(mode="json"))
    return path


def small(*overrides: str) -> Recipe:
    return load_recipe("demo", ["model.warm_start={steps: 12, batch_size: 8}", *overrides])


def test_the_folder_is_whole_and_the_same_when_made_again(manifest: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from appo.modeling.loading import load_policy, load_processor

    summary = warm_start(small(), manifest, tmp_path / "one", progress=False)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["samples"] == 24
    assert 0 <= summary["accuracy_hard"] <= 1
    # Twelve steps at full rate: from log(vocabulary), about 5.8, to the frequency of the target's tokens.
    assert summary["loss"] < 3.5
    assert "accuracy_easy" not in summary  # too few samples to hold any out
    load_policy(str(tmp_path / "one"), small().model)
    assert load_processor(str(tmp_path / "one")).chat_template == tiny.CHAT_TEMPLATE
    # A folder left behind by a run that was cut off does not survive in the next one's result.
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "stale").touch()
    warm_start(small(), manifest, tmp_path / "two", progress=False)
    assert not (tmp_path / "two" / "stale").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")] == []
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    # The same machine and thread count: the same sums in the same order.
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_without_samples_or_settings_it_says_so(manifest: Path, tmp_path: Path) -> None:
    empty = tmp_path / "manifest.jsonl"
    write_manifest(empty, [replace(CHOICE, split="test")], root=".")
    with pytest.raises(ManifestError, match=r"no sample in the splits warm_start and train"):
        warm_start(small(), empty, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"model\.warm_start=null"):
        warm_start(small("model.path=x", "model.warm_start=null"), manifest, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_screen_is_told_when_the_easy_questions_were_not_learned() -> None:
    summary = {"parameters": 900_000, "steps": 20, "wall_s": 3.2, "accuracy_easy": 0.99, "accuracy_hard": 0.5}
    said = _in_words(summary)
    assert said == (
        "warm start: 0.9 M parameters, 20 steps, 99% of easy questions right, 50% of hard ones (3 s)"
    )
    assert "raise model.warm_start.steps=20" in _in_words(summary | {"accuracy_easy": 0.4})
