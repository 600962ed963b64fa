"""The tiny model is a Qwen2.5-VL like any other: its tokenizer spells everything, its processor changes no frame."""

from __future__ import annotations

import copy
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appo.config import Video
from appo.data.schema import VideoSample
from appo.data.video import VideoFrames
from appo.modeling import windows
from appo.modeling.inputs import build_inputs, vision_kwargs
from appo.training import tiny

TEXTS = ["Which colour is shown?\nA. red\nB. green", "<think>it shows red</think><answer>A</answer>"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.make_tokenizer(TEXTS)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny.make_model(tokenizer, seed=0).eval()


def frames(count: int, height: int, width: int, seed: int = 0) -> VideoFrames:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return VideoFrames(pixels, np.arange(count, dtype=float), tuple(range(count)), 1.0, float(count), count)


def sample(name: str = "s") -> VideoSample:
    return VideoSample(name, "test", "multiple choice", "Which?", "A", ("red", "green"), video="v.mp4")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8")))
def test_any_text_survives(tokenizer, text: str) -> None:
    # Qwen's tokenizer normalises to NFC before it encodes.
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_tags_special_tokens_and_learned_words_are_one_token_each(tokenizer) -> None:
    for name in (*tiny.TAGS, *tiny.SPECIAL, " red", " shows", "it"):
        assert len(tokenizer(name)["input_ids"]) == 1, name
    text = "<think>it shows red</think><answer>A</answer>"
    ids = tokenizer(text + tokenizer.eos_token)["input_ids"]
    assert len(ids) == 9
    # Tags are text, so that parsers see them; markers of turns and vision are not.
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(("height", "width"), [(28, 28), (112, 140)])
def test_frames_pass_the_processor_unchanged(tokenizer, model, height: int, width: int) -> None:
    processor = tiny.make_processor(tokenizer, Video(num_frames=4, max_pixels=224 * 224))
    given_frames = frames(4, height, width)
    inputs = build_inputs(processor, model, sample(), given_frames, None, template="bare")
    t, h, w = inputs.video.grid_thw[0].tolist()
    assert (t, h, w) == (2, height // 14, width // 14)
    assert int((inputs.frame_of_token >= 0).sum()) == t * (h // 2) * (w // 2)
    # patches (t, h/2, w/2, 2, 2) of (channel, time, 14, 14) -> frames
    patches = inputs.video.pixels.view(t, h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    pixels = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(4, height, width, 3)
    video_processor = processor.video_processor
    mean, std = torch.tensor(video_processor.image_mean), torch.tensor(video_processor.image_std)
    # Half a grey level: float32 rounding is far below, any resampling far above.
    assert torch.allclose(
        (pixels * std + mean) * 255, torch.from_numpy(given_frames.frames).float(), atol=0.5
    )


def test_a_demo_frame_is_one_visual_token(tokenizer, model) -> None:
    processor = tiny.make_processor(tokenizer, Video(num_frames=16, max_pixels=784))
    inputs = build_inputs(processor, model, sample(), frames(16, 28, 28), None, template="bare")
    assert inputs.frame_of_token[inputs.frame_of_token >= 0].tolist() == list(range(8))
    # Temporal positions differ from patch to patch.
    assert len(set(inputs.positions[0][inputs.frame_of_token >= 0].tolist())) == 8


def test_the_folder_gives_back_what_was_saved(tokenizer, model, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from appo.modeling import positions

    processor = tiny.make_processor(tokenizer, Video(num_frames=4, max_pixels=784))
    tiny.save(model, processor, tmp_path / "tiny")
    loaded = positions.install(AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny")).eval()
    again = AutoProcessor.from_pretrained(tmp_path / "tiny")
    assert type(again).__name__ == "Qwen2_5_VLProcessor"
    assert again.video_processor.cap_pixels_per_frame is True
    assert again.video_processor.do_sample_frames is False
    ours, theirs = (
        build_inputs(p, model, sample(), frames(4, 28, 28), None, template="bare") for p in (processor, again)
    )
    assert ours.text == theirs.text
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.video.pixels, theirs.video.pixels)
    with torch.no_grad():
        logits = [
            m(
                input_ids=ours.ids[None],
                position_ids=ours.positions[:, None],
                **vision_kwargs([ours], m, torch.device("cpu")),
            ).logits
            for m in (model, loaded)
        ]
    assert torch.equal(logits[0], logits[1])
    assert loaded.generation_config.eos_token_id[0] == tokenizer.eos_token_id


def test_weights_follow_the_seed_and_leave_global_randomness_alone(tokenizer) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = (tiny.make_model(tokenizer, seed=s).state_dict() for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_impossible_sizes_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="heads=5"):
        tiny.make_model(tokenizer, seed=0, shape=tiny.TinyShape(heads=5))


@pytest.mark.parametrize("sizes", [[(28, 28), (28, 28)], [(112, 140), (28, 28), (224, 112)]])
def test_batched_windows_change_nothing_but_the_speed(tokenizer, model, sizes) -> None:
    """Values and gradients of the tower, for equal windows and for windows cut by the frame's edge."""
    processor = tiny.make_processor(tokenizer, Video(num_frames=4, max_pixels=224 * 224))
    prompts = [
        build_inputs(processor, model, sample(), frames(4, *size, seed), None, template="bare")
        for seed, size in enumerate(sizes)
    ]
    pixels = torch.cat([p.video.pixels for p in prompts])
    grid = torch.cat([p.video.grid_thw for p in prompts])

    def run(tower) -> tuple[torch.Tensor, list[torch.Tensor]]:
        tower.zero_grad()
        out = tower(pixels, grid_thw=grid).pooler_output
        (out**2).sum().backward()
        return out.detach().clone(), [p.grad.clone() for p in tower.parameters()]

    plain, plain_gradients = run(copy.deepcopy(model).model.visual)
    installed = windows.install(copy.deepcopy(model)).model.visual
    batched, batched_gradients = run(installed)
    # float32 sums of up to 1,176 terms in another order
    assert torch.allclose(plain, batched, rtol=1e-4, atol=1e-4)
    for one, other in zip(plain_gradients, batched_gradients, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm() + 1e-6
    # A copy works with its own weights.
    other = copy.deepcopy(installed)
    with torch.no_grad():
        for parameter in installed.parameters():
            parameter.zero_()
    again, _ = run(other)
    assert torch.equal(again, batched)
