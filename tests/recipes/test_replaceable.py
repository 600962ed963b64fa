"""What a test of a shipped recipe may replace, and that its stand-ins are what they stand in for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from appo.config import Recipe, load_recipe, recipe_names
from tests.recipes.replaceable import PROCESSES, REPLACEABLE, outside, processes_of
from tests.recipes.sets import SIDE
from tests.recipes.stand_in import GENERATION, PREPROCESSOR, RELEASED
from tests.recipes.whole_path import Sets, assembled, prepared
from tests.tiers import long

# --- What may be replaced ---------------------------------------------------------------------------------------


def test_the_list_holds_sizes_and_places_and_nothing_else() -> None:
    """Not what the issue of a run hangs on: type, layout, prompts' form, frames, completions, algorithms, decoding."""
    kept = ("model.dtype", "model.lora", "model.freeze_vision", "video", "policy", "perception", "algorithms")
    kept += ("data.template", "data.source", "data.problem_types", "data.encoding", "evaluation.benchmarks")
    kept += ("evaluation.engine", "evaluation.max_tokens", "evaluation.temperature", "evaluation.seeds")
    kept += ("training.distributed", "training.learning_rate", "training.gradient_checkpointing")
    kept += (
        "training.gradient_accumulation_steps",
        "training.seeds",
        "training.rollout",
        "training.save_every",
    )
    for setting in kept:
        assert not [key for key in REPLACEABLE if key == setting or key.startswith(f"{setting}.")]
    whys = {allowed.why.partition(":")[0].partition(",")[0] for allowed in REPLACEABLE.values()}
    sizes = {"number of prompts", "number of steps", "number of processes"}
    places = {"place of the records", "place of the videos", "place of the model"}
    assert whys == sizes | places | {"cluster", "data.workers"}


@pytest.mark.parametrize(
    ("changed", "setting"),
    [
        ("model.dtype=float32", "model.dtype"),
        ("training.distributed=ddp", "training.distributed"),
        ("data.template=bare", "data.template"),
        ("video.num_frames=8", "video.num_frames"),
        ("policy.num_generations=4", "policy.num_generations"),
        ("policy.max_completion_length=32", "policy.max_completion_length"),
        ("algorithms=[appo]", "algorithms"),
        ("evaluation.benchmarks=[nextqa]", "evaluation.benchmarks"),
        ("evaluation.max_tokens=8", "evaluation.max_tokens"),
        ("training.gradient_checkpointing=false", "training.gradient_checkpointing"),
        ("model.lora={rank: 4}", "model.lora"),
        ("data.quotas={STAR: all}", "data.quotas"),
        ("data.quotas.STAR=2", "data.quotas"),
        ("data.quotas.CLEVRER=60000", "data.quotas"),
        ("training.prompts_per_step=17", "training.prompts_per_step"),
        ("training.max_steps=-1", None),  # the shipped value
        ("data.workers=1", None),
        ("cluster.nodes=7", None),
    ],
)
def test_a_difference_outside_of_the_list_is_found(changed: str, setting: str | None) -> None:
    shipped = load_recipe("qwen2.5_vl_7b_video_r1_34k")
    found = outside(shipped, load_recipe(shipped.name, [changed]))
    assert [line.partition(":")[0] for line in found] == ([] if setting is None else [setting])


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_passes_its_first_step_and_divides_over_the_tests_processes(
    name: str, made: Sets, some_model: Path
) -> None:
    model = None if load_recipe(name).model.path is None else some_model
    shipped, recipe = prepared(name, made, model)
    assert model is None or shipped.model.path in RELEASED
    rows = [
        r.training.prompts_per_step * r.policy.num_generations
        / (p * r.training.gradient_accumulation_steps)
        for r, p in ((shipped, processes_of(shipped)), (recipe, min(PROCESSES, processes_of(shipped))))
    ]  # fmt: skip
    assert rows[0] == rows[1]  # completions that a process scores at a time


# --- The sets are the publishers' ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count", "videos"),
    [
        ("qwen2.5_vl_7b_video_r1_34k", 3 + 4 + 4 + 3 + 3, None),
        ("qwen2.5_vl_3b_perception_test_6k", 4, 4),
        ("qwen2.5_vl_3b_seed_bench_r1_6k", 4, 3),
        ("qwen2.5_vl_3b_nextgqa_3k", 4, 4),
        ("qwen2.5_vl_3b_lora_2gpu", 22, None),
    ],
)
def test_made_sets_are_assembled_without_a_reject(
    name: str, count: int, videos: int | None, made: Sets, some_model: Path, tmp_path: Path
) -> None:
    _, recipe = prepared(name, made, some_model)
    done, manifest = assembled(recipe, tmp_path)
    assert len(manifest.samples) == count
    assert Path(done.metadata["rejects"]).read_text() == ""
    assert videos is None or sum(s.video is not None for s in manifest.samples) == videos
    from appo.data.frames import open_frames

    frames = open_frames(manifest, recipe)
    shown = next(s for s in manifest.samples if s.video is not None)
    assert frames.load(shown).frames.shape == (recipe.video.num_frames, 224, 224, 3)  # 64 visual tokens each
    assert SIDE > 224
    if recipe.data.source == "nextgqa":
        assert all(s.key_times for s in manifest.samples)
    if recipe.data.quotas:
        assert {s.source for s in manifest.samples} == set(recipe.data.quotas)
        kinds = {s.problem_type for s in manifest.samples if s.source == "LLaVA-Video-178K"}
        assert kinds == {"multiple choice"}


@pytest.mark.slow
@long
def test_the_stand_in_has_the_published_settings_and_draws_right_and_wrong_answers(
    stand_in: Callable[[Recipe], Path | None],
) -> None:
    from transformers import AutoModelForImageTextToText

    from appo.modeling.loading import load_processor
    from appo.rewards.format import format_reward

    folder = stand_in(load_recipe("qwen2.5_vl_3b_perception_test_6k"))
    processor = load_processor(str(folder))
    assert processor.image_processor.size["longest_edge"] == PREPROCESSOR["max_pixels"]
    assert "<think>" not in processor.tokenizer.get_vocab()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype.is_floating_point
    assert str(model.dtype) == "torch.bfloat16"
    assert model.generation_config.repetition_penalty == GENERATION["repetition_penalty"]
    vision = model.config.vision_config
    assert (vision.patch_size, vision.window_size, vision.tokens_per_second) == (14, 112, 2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight  # 3B
    asked = processor.apply_chat_template(
        [{"role": "user", "content": "Which object moves first?\nA. red ball\nB. green cube"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True, tokenize=True,
    )  # fmt: skip
    drawn = model.float().generate(
        **asked, do_sample=True, temperature=1.0, repetition_penalty=1.0, num_return_sequences=16,
        max_new_tokens=64,
    )  # fmt: skip
    texts = processor.tokenizer.batch_decode(
        drawn[:, asked["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert sum(format_reward(text, template="reasoning") for text in texts) >= 8
    assert len(set(texts)) > 2
