"""Rollouts with transformers: the same tokens however they are cut, in the memory that was stated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.modeling.generation import Sampling
from appo.modeling.inputs import PromptInputs, Vision
from appo.training import rollouts
from appo.training.rollouts import generate_groups, parts_within, token_bytes
from appo.training.sampling import KeepLogps
from tests.modeling import models
from tests.training.conftest import Bench, largest_difference

CPU = torch.device("cpu")
GIB = 2**30


def prompt(model: Any, *, frames: int, text: int, seed: int) -> PromptInputs:
    made = models.prompt(model.config.model_type, frames=frames, text=text, image=seed % 2 == 0, seed=seed)
    image = None if made.pixels_image is None else Vision(made.pixels_image, made.grid_image)
    return PromptInputs(
        sample=VideoSample(f"sample {seed}", "t", "free-form", "q?", "a", video="v.mp4"),
        text="",
        ids=made.ids,
        token_types=made.types,
        frame_of_token=made.frames,
        positions=models.rope(model, made),
        num_frames=frames,
        video=Vision(made.pixels_video, made.grid_video),
        image=image,
        seconds_per_grid=torch.tensor([made.seconds]),
        timestamps_s=(),
    )


def prompts_of(model: Any) -> list[PromptInputs]:
    """Five, of different lengths, and one of them twice."""
    found = [prompt(model, frames=2 + seed % 3, text=3 + 4 * seed, seed=seed) for seed in range(4)]
    return [*found, found[1]]


def drawn(model: Any, prompts: list[PromptInputs], size: int, **kwargs: Any) -> list[list[int]]:
    sampling = Sampling(6, (7,), models.PAD, temperature=0.9)
    return generate_groups(
        model, prompts, size, sampling=sampling, seeds=range(len(prompts) * size), device=CPU, **kwargs
    )


@torch.no_grad()
def full_pass(model: Any, prompt: PromptInputs, completion: list[int]) -> Tensor:
    """(N, V) log-probabilities from one pass over the prompt and its completion, without a cache."""
    from appo.modeling.inputs import vision_kwargs

    more = torch.arange(len(completion)) + int(prompt.positions.max()) + 1
    visual = vision_kwargs([prompt], model, CPU)
    visual.pop("second_per_grid_ts", None)
    logits = model(
        input_ids=torch.cat([prompt.ids, torch.tensor(completion)])[None],
        position_ids=torch.cat([prompt.positions, more.expand(3, -1)], dim=1)[:, None],
        **visual,
    ).logits
    return logits[0, len(prompt.ids) - 1 : -1].log_softmax(dim=-1)


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_token_is_drawn_from_what_a_pass_without_cache_and_padding_gives(
    family: str, window: int | None
):
    if window and family == "qwen3_vl":
        pytest.skip("Qwen3-VL has no sliding-window layers")
    model = models.build(family, sliding_window=window)
    keep, prompts = KeepLogps(), prompts_of(model)
    sampling = Sampling(6, (7,), models.PAD)
    found = generate_groups(
        model, prompts, 2, sampling=sampling, seeds=range(10), device=CPU, before_draw=keep
    )
    for row, completion in enumerate(found):
        # A visual token that was drawn stands for features that do not exist; in training none is.
        seen = next((i for i, token in enumerate(completion) if token in (models.IMAGE, models.VIDEO)), None)
        completion = completion[:seen]
        if not completion:
            continue
        expected = full_pass(model, prompts[row // 2], completion)
        ours = torch.stack([keep.steps[step][row] for step in range(len(completion))])
        # float32 sums of a few hundred terms in another order
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_cutting_into_parts_changes_no_completion(monkeypatch: pytest.MonkeyPatch):
    model = models.build("qwen2_5_vl")
    prompts = prompts_of(model)
    whole = drawn(model, prompts, 3)
    prefilled: list[int] = []
    run = rollouts.prefill
    monkeypatch.setattr(rollouts, "prefill", lambda m, p, *a: prefilled.append(len(p)) or run(m, p, *a))
    longest = max(len(p.ids) for p in prompts) + 6
    for completions, calls in ((15, 1), (6, 3), (3, 5), (2, 8), (1, 15)):
        prefilled.clear()
        found = drawn(model, prompts, 3, memory_gib=completions * longest * token_bytes(model, CPU) / GIB)
        assert found == whole
        assert len(prefilled) == calls or completions == 2  # shorter prompts may fit in more


def test_training_in_parts_is_the_same_training(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    run = rollouts.prefill
    monkeypatch.setattr(rollouts, "prefill", lambda m, p, *a: calls.append(len(p)) or run(m, p, *a))
    bench.train("appo", name="whole")
    whole, looked = list(calls), (bench.folder / "whole" / "groups.jsonl").read_text()
    calls.clear()
    # 2,048 bytes a token in float32, prompts of 50 tokens: three completions at once.
    bench.train("appo", "training.rollout_memory_gib=0.00035", name="cut")
    assert len(calls) > 3 * len(whole)
    assert largest_difference(bench.weights("whole"), bench.weights("cut")) == 0.0
    assert (bench.folder / "cut" / "groups.jsonl").read_text() == looked


def test_parts_are_as_large_as_fits_and_no_larger():
    model = models.build("qwen2_5_vl")
    prompts = prompts_of(model)
    owners = [p for p in prompts for _ in range(4)]
    for memory_gib in (5e-5, 7e-5, 2e-4, 1.0):
        parts = parts_within(owners, 6, 1000, memory_gib)
        assert [row for part in parts for row in part] == list(range(20))

        def held(rows: range) -> int:
            return len(rows) * (max(len(owners[r].ids) for r in rows) + 6) * 1000

        assert all(held(part) <= memory_gib * GIB for part in parts)
        grown = [range(part.start, part.stop + 1) for part in parts[:-1]]
        assert all(held(part) > memory_gib * GIB for part in grown)
    assert parts_within(owners, 6, 1000, None) == [range(20)]


def test_a_completion_that_does_not_fit_is_refused_with_what_it_needs():
    model = models.build("qwen2_5_vl")
    named = (
        r"rollout_memory_gib=1e-05: one completion of sample sample 0 \(.* 6 drawn\) holds .* GiB .*raise it"
    )
    with pytest.raises(SettingError, match=named):
        drawn(model, prompts_of(model), 3, memory_gib=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "autocast"])
def test_the_counted_bytes_are_those_of_the_cache(monkeypatch: pytest.MonkeyPatch, kind: str):
    model = models.build("qwen2_5_vl")
    if kind == "bfloat16":
        model = model.bfloat16()
    made: list[Any] = []
    run = rollouts.prefill
    monkeypatch.setattr(rollouts, "prefill", lambda *a: made.append(run(*a)) or made[-1])
    prompts = prompts_of(model)
    sampling = Sampling(6, (), models.PAD)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        each = token_bytes(model, CPU)
        generate_groups(model, prompts, 3, sampling=sampling, seeds=range(15), device=CPU)
    held = sum(states.nbytes for layer in made[0].layers for states in (layer.keys, layer.values))
    length = made[0].get_seq_length()
    assert length == max(len(p.ids) for p in prompts) + 5  # the last token is drawn, not run
    assert held == 15 * length * each


def test_no_pass_builds_a_mask_of_prompt_length_squared(monkeypatch: pytest.MonkeyPatch):
    """Padding and causality hide nothing more than kernels do by themselves; a mask for 16 prompts of 13,000 tokens
    would be 2.7 GB, and keep the fastest kernels away.
    """
    from transformers import AttentionInterface

    from appo.modeling import attention

    masks: list[tuple[int, ...]] = []

    def watching(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        if getattr(module, "layer_idx", None) is not None:
            mask = args[2]
            masks.append((query.shape[2], 0 if mask is None else mask.numel()))
        return attention.appo_attention(module, query, *args, **kwargs)

    model = models.build("qwen2_5_vl")
    AttentionInterface.register(attention.NAME, watching)
    try:
        drawn(model, prompts_of(model), 3)
    finally:
        attention.register()
    prefills = [size for length, size in masks if length > 1]
    assert len(prefills) == 4  # one a layer, for all prompts together
    assert set(prefills) == {0}
    longest = max(len(p.ids) for p in prompts_of(model)) + 6
    assert max(size for _, size in masks) <= 15 * longest


def test_the_papers_recipes_fit_the_default_in_one_part():
    """16 prompts of 2,000 tokens with 8 completions of 512, on one process, at 7B; 13,000 tokens do not."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from appo.config import Training

    text = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": 64, "intermediate_size": 8}, dtype="bfloat16"
    )
    config.vision_config.depth = 1
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    each = token_bytes(model, torch.device("cuda"))
    assert each == 57_344  # 28 layers x (keys + values) x 4 heads x 128 x 2 bytes

    class Long:
        def __init__(self, tokens: int):
            self.ids, self.sample = (
                range(tokens),
                VideoSample("s", "t", "free-form", "q?", "a", video="v.mp4"),
            )

    default = Training().rollout_memory_gib
    paper, longer = [Long(2000)] * 128, [Long(13_000)] * 128
    assert len(parts_within(paper, 512, each, default)) == 1  # type: ignore[arg-type]
    parts = parts_within(longer, 512, each, default)  # type: ignore[arg-type]
    assert len(parts) == 5  # of 27 completions
    assert all(len(part) * 13_512 * each <= default * GIB for part in parts)
