"""Rotary positions are vLLM's to the last patch, for any number of frames and any duration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from appo.data.schema import VideoSample
from appo.data.video import VideoFrames
from appo.modeling import features
from appo.modeling.inputs import PromptInputs, Vision
from appo.modeling.positions import IMAGE, TEXT, VIDEO
from tests.modeling import models

FRAMES = (4, 8, 16, 30, 32, 64)
DURATIONS_S = tuple(tenths / 10 for tenths in range(10, 478))  # 1 s to 47.7 s


def seconds_of(frames: int, duration_s: float) -> float:
    import numpy as np

    shown = np.empty((frames, 0, 0, 3), dtype=np.uint8)
    times = np.linspace(0, duration_s, frames, endpoint=False)
    fps = frames / duration_s
    return VideoFrames(shown, times, tuple(range(frames)), fps, duration_s, frames).second_per_grid


def prompt(model: Any, frames: int, duration_s: float, *, image: bool = False, text: int = 5) -> PromptInputs:
    """As `build_inputs` makes it of a video with one token a temporal patch, without a tokenizer or a pixel."""
    patches = frames // 2
    grid = torch.tensor([[patches, 2, 2]])
    kinds = torch.tensor(
        [TEXT] * 3 + [IMAGE] * (4 if image else 0) + [TEXT] + [VIDEO] * patches + [TEXT] * text
    )
    ids = torch.tensor([7, models.IMAGE, models.VIDEO])[kinds]
    seconds = torch.tensor([seconds_of(frames, duration_s)], dtype=torch.float32)
    picture = Vision(torch.zeros(16, 3), torch.tensor([[1, 4, 4]])) if image else None
    positions, _ = features.base_model(model).get_rope_index(
        ids.unsqueeze(0),
        mm_token_type_ids=kinds.unsqueeze(0),
        image_grid_thw=None if picture is None else picture.grid_thw,
        video_grid_thw=grid,
        second_per_grid_ts=seconds,
    )
    return PromptInputs(
        sample=VideoSample(f"{frames} frames of {duration_s} s", "t", "free-form", "q?", "a", video="v.mp4"),
        text="",
        ids=ids,
        token_types=kinds,
        frame_of_token=torch.full_like(ids, -1),
        positions=positions[:, 0],
        num_frames=patches,
        video=Vision(torch.zeros(patches * 4, 3), grid),
        image=picture,
        seconds_per_grid=seconds,
        timestamps_s=(),
    )


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("qwen2_5_vl")


def test_positions_equal_vllms_own_of_every_simulated_video(model: Any):
    """A float32 product of seconds and patch number rounds up where vLLM's, in float64, stays below a whole."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from appo.modeling.vllm_inputs import engine_positions

    simulated, different = 0, []
    for frames in FRAMES:
        for duration_s in DURATIONS_S:
            made = prompt(model, frames, duration_s, image=simulated % 7 == 0, text=simulated % 3)
            simulated += 1
            if not torch.equal(made.positions, engine_positions(made, model.config)):
                different.append(made.sample.id)
    assert simulated >= 2808
    assert not different, f"{len(different)} of {simulated}: {different[:5]}"


def test_what_vllm_numbers_depends_on_all_that_it_is_handed(model: Any):
    """The counterpart: a comparison that saw nothing of the prompt would find no difference either."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from appo.modeling.vllm_inputs import engine_positions

    made = prompt(model, 16, 20.0)
    slower = replace(made, seconds_per_grid=made.seconds_per_grid * 2)
    wider = replace(made, video=replace(made.video, grid_thw=torch.tensor([[4, 2, 4]])))
    found = [engine_positions(p, model.config) for p in (made, slower, wider)]
    assert torch.equal(found[0], made.positions)
    assert not torch.equal(found[1], found[0])
    assert not torch.equal(found[2], found[0])


def test_qwen2_vl_knows_no_seconds_in_either_engine():
    """Its temporal patches are numbered one by one; vLLM would scale them by seconds, were it handed any."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import numpy as np

    from appo.config import Video
    from appo.modeling.inputs import build_inputs
    from appo.modeling.vllm_inputs import engine_positions
    from appo.training import tiny

    qwen2 = models.build("qwen2_vl")
    tokenizer = tiny.make_tokenizer(["Which?"] * 4)
    processor = tiny.make_processor(tokenizer, Video(num_frames=8, max_pixels=784))
    frames = VideoFrames(
        np.zeros((8, 28, 28, 3), np.uint8), np.arange(8) * 3.0, tuple(range(8)), 1 / 3, 24.0, 8
    )
    sample = VideoSample("s", "t", "multiple choice", "Which?", "A", ("red", "green"), video="v.mp4")
    made = build_inputs(processor, qwen2, sample, frames, None, template="bare")
    first = int((made.token_types == VIDEO).nonzero()[0])
    assert made.positions[0, first : first + 4].tolist() == [first, first + 1, first + 2, first + 3]
    assert torch.equal(engine_positions(made, qwen2.config), made.positions)
