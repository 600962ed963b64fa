"""`appo plan`: laws of its lines, the remedy that really helps, the verdict's status, the paper's speed.

That the bytes are right is another matter, which only real trainings can say: `benchmarks/plan_memory.py`, and
`test_memory.py` for one of its rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from appo import cli
from appo.modeling.architecture import published
from appo.planning import memory
from appo.planning.plan import fit, usable_gib
from appo.planning.setting import PlanError, settings_of
from tests.planning.conftest import SEVEN, THREE, changed, paper

LINES = {
    *("parameters", "gradients", "masters", "moments", "reference", "activations"),
    *("logits", "kv_cache", "vision_features", "engine", "total"),
}


def largest(recipe, gpus):
    """Lines of the first algorithm's moments, in bytes."""
    found, load, _ = settings_of(recipe, gpus)
    return memory.lines(memory.moments(found[0], load, 80 * 2**30)), load, found[0]


# The shape of the answer ------------------------------------------------------------------------------------------


def test_the_papers_run_fits_its_sixteen_gpus():
    plan = fit(paper(), 16, 80)
    assert plan.fits
    assert plan.remedy is None
    assert set(plan.per_gpu_gib) == LINES
    assert plan.per_gpu_gib["total"] <= sum(v for k, v in plan.per_gpu_gib.items() if k != "total")
    assert plan.per_gpu_gib["total"] < usable_gib(80)
    assert plan.checkpoint_gib == pytest.approx(8_292_166_656 * 2 / 2**30)
    # float32 masters and two moments of all but the frozen tower
    assert plan.resumable_gib == pytest.approx((8_292_166_656 - 676_550_144) * 12 / 2**30)
    assert plan.gpu_hours == pytest.approx(16 * plan.hours)
    json.loads(plan.to_json())


def test_a_plan_takes_no_time_and_no_torch():
    code = (
        "import sys; from appo.config import load_recipe; from appo.planning.plan import fit;"
        "fit(load_recipe('demo', ['model.path=Qwen/Qwen2.5-VL-7B-Instruct', 'model.dtype=bfloat16']), 16, 8);"
        "sys.exit('torch' in sys.modules)"
    )
    began = time.process_time()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.process_time() - began < 2


# Laws -------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8, 16, 32]), st.sampled_from([4, 8]), st.sampled_from([8, 16]))
def test_twice_the_frames(frames, generations, gpus):
    def lines_of(count):
        settings_ = (f"video.num_frames={count}", f"policy.num_generations={generations}")
        return largest(paper(*settings_, "perception.k2=1"), gpus)

    (one, load, setting), (two, more, _) = lines_of(frames), lines_of(2 * frames)
    assert more.visual == 2 * load.visual
    features = load.looked_at * load.visual * setting.architecture.tower.width * 2
    assert two["vision_features"] - one["vision_features"] == pytest.approx(
        max(features, _encoder_growth(setting, load, more)), rel=1e-9
    )
    # Keys and values of every completion's copy of the prompt.
    text = setting.architecture.text
    each = text.layers * text.keys * 4
    grown = two["kv_cache"] - one["kv_cache"]
    assert grown == pytest.approx(
        load.looked_at * generations * load.visual * each * (1 + 1 / text.layers), rel=1e-9
    )
    for line in ("gradients", "masters", "moments", "reference", "parameters", "engine"):
        assert two[line] == one[line]
    # Each token of a prompt costs the same: as many activations more as there are tokens more.
    four, most, _ = lines_of(4 * frames)
    grown = four["activations"] - two["activations"]
    assert grown == pytest.approx(2 * (two["activations"] - one["activations"]), rel=0.02)
    assert (most.visual, grown > 0) == (4 * load.visual, True)


def _encoder_growth(setting, load, more):
    from appo.planning import activations

    def most(one):
        features = one.visual * setting.architecture.tower.width * 2
        return max(one.looked_at * features, features + activations.encoder(setting, one))

    return most(more) - most(load)


def kept_for_backward(setting, load):
    """Activations where the backward pass begins."""
    (at_head,) = (m for m in memory.moments(setting, load) if m.name == "update: head backward")
    return at_head.lines["activations"]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 4, 8]), st.booleans(), st.sampled_from(["transformers", "vllm_server"]))
def test_twice_the_completions(generations, shared, rollout):
    def lines_of(count):
        settings_ = [f"policy.num_generations={count}", f"training.shared_prefix={str(shared).lower()}"]
        if rollout != "transformers":
            settings_ += [f"training.rollout={rollout}", "training.vllm_server_url=http://x:8000"]
        return largest(paper(*settings_, "training.prompts_per_step=16"), 16)

    (one, load, setting), (two, more, _) = lines_of(generations), lines_of(2 * generations)
    # A pass's memory: of twice the rows twice, of packed groups less, their prompts being there once.
    first, second = kept_for_backward(setting, load), kept_for_backward(setting, more)
    assert second == pytest.approx(2 * first, rel=0.01) if not shared else first < second < 2 * first
    assert two["kv_cache"] == 2 * one["kv_cache"]
    assert two["vision_features"] == one["vision_features"]
    for line in ("gradients", "masters", "moments", "reference", "parameters"):
        assert two[line] == one[line]
    run = memory.activations.scoring_pass
    ratio = run(
        setting, replace(load, members=2 * generations, group_size=2 * generations, rows=2 * load.rows)
    ).tokens
    ratio /= run(setting, load).tokens
    assert ratio == 2 if not shared else 1 < ratio < 2


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([4, 8, 16]), st.sampled_from(["fsdp2", "zero2", "zero3", "ddp"]))
def test_half_the_gpus(gpus, layout):
    recipe = paper(f"training.distributed={layout}", "training.gradient_accumulation_steps=1")
    (many, load, _), (few, more, _) = largest(recipe, gpus), largest(recipe, gpus // 2)
    assert more.rows == 2 * load.rows
    factor = 1 if layout == "ddp" else 2
    assert few["masters"] == pytest.approx(factor * many["masters"])
    assert few["moments"] == pytest.approx(factor * many["moments"])
    sharded = layout in ("fsdp2", "zero3")
    assert few["reference"] == pytest.approx((2 if sharded else 1) * many["reference"])
    assert few["total"] > many["total"]
    # Twice the groups on each; a part of them is drawn at a time, as the budget for their cache allows.
    assert few["activations"] == pytest.approx(2 * many["activations"], rel=0.05)
    assert many["kv_cache"] <= few["kv_cache"] <= 2 * many["kv_cache"]
    assert few["parameters"] >= many["parameters"]
    assert few["gradients"] >= many["gradients"]
    twice = fit(recipe, gpus // 2, 80, remedies=False).hours / fit(recipe, gpus, 80, remedies=False).hours
    assert 1 < twice <= 2.01


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["fsdp2", "zero2", "zero3", "ddp"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_what_saves_memory_never_costs_any(layout, dtype, lora, shared, accumulation):
    settings_ = [
        f"training.distributed={layout}",
        f"model.dtype={dtype}",
        f"training.shared_prefix={str(shared).lower()}",
        f"training.gradient_accumulation_steps={accumulation}",
        *(["model.lora.rank=8"] if lora else []),
    ]

    def line(which, *more):
        found, load, _ = settings_of(paper(*settings_, *more), 4)
        return {s.reference: memory.lines(memory.moments(s, load))[which] for s in found}

    for algorithm, value in line("activations").items():
        kept = line("activations", "training.gradient_checkpointing=false")
        assert value <= kept[algorithm]
    ours, whole = line("moments"), line("moments", "training.distributed=ddp")
    assert all(ours[a] <= whole[a] for a in ours)


def test_a_reference_is_held_for_grpo_alone():
    with_kl = fit(paper("algorithms=[grpo]"), 16, 80).per_gpu_gib
    without = fit(paper("algorithms=[dapo]"), 16, 80).per_gpu_gib
    text = published()["Qwen/Qwen2.5-VL-7B-Instruct"].parameters
    assert with_kl["reference"] == pytest.approx((text.text + text.head) * 2 / 16 / 2**30)
    assert without["reference"] == 0
    assert fit(paper("algorithms=[grpo]", "model.lora.rank=8"), 16, 80).per_gpu_gib["reference"] == 0


def test_an_engine_takes_its_share():
    shared = paper("training.rollout=vllm_colocate", "training.vllm_gpu_memory_utilization=0.3")
    assert fit(shared, 16, 80).per_gpu_gib["engine"] == pytest.approx(24)
    small = fit(changed(shared, ["training.vllm_gpu_memory_utilization=0.1"]), 16, 80)
    assert not small.fits
    assert "the engine's 8.0 GiB" in small.assumed[0]


def test_trained_towers_cost_masters_moments_and_gradients():
    frozen, trained = fit(paper(), 16, 80), fit(paper("model.freeze_vision=false"), 16, 80)
    tower = published()["Qwen/Qwen2.5-VL-7B-Instruct"].parameters.tower
    assert trained.per_gpu_gib["moments"] - frozen.per_gpu_gib["moments"] == pytest.approx(
        tower * 8 / 16 / 2**30
    )


# Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "measured"), [((SEVEN, "video.num_frames=16"), 0.462), (THREE, 0.325)], ids=["7B", "3B"]
)
def test_the_papers_own_layout_is_about_as_fast_as_the_paper_says(model, measured):
    """Supplement, table F: DAPO, samples per second on sixteen GPUs; every completion with a prompt of its own."""
    plan = fit(paper(*model, "training.shared_prefix=false", "algorithms=[dapo]"), 16, 80)
    assert plan.samples_per_second == pytest.approx(measured, rel=0.25)


def steps_of(plan):
    (note,) = (note for note in plan.assumed if note.endswith(" steps") and note.split()[0].isdigit())
    return int(note.split()[0])


def test_hours_follow_steps_and_data():
    once = fit(paper("training.max_steps=1000"), 16, 80)
    assert fit(paper("training.max_steps=2000"), 16, 80).hours == pytest.approx(2 * once.hours, rel=0.01)
    # Updates share a rollout: as many rollouts of the same prompts, twice the steps, less than twice the time.
    twice = fit(paper("training.updates_per_rollout=2", "training.save_every=50", "data.limit=1600"), 16, 80)
    single = fit(paper("data.limit=1600"), 16, 80)
    assert steps_of(twice) == 2 * steps_of(single)
    assert single.hours < twice.hours < 2 * single.hours
    shorter = fit(
        paper("training.updates_per_rollout=2", "training.save_every=50", "training.max_steps=1000"), 16, 80
    )
    assert 0.4 * once.hours < shorter.hours < once.hours
    half, whole = fit(paper("data.limit=1600"), 16, 80), fit(paper("data.limit=3200"), 16, 80)
    assert whole.hours == pytest.approx(2 * half.hours, rel=0.05)
    unread = fit(paper("data.source=video_r1", "data.quotas={STAR: all, Mine: all}"), 16, 80)
    assert any("none for Mine" in note for note in unread.assumed)


# The command ------------------------------------------------------------------------------------------------------


def command(*arguments):
    return CliRunner().invoke(cli.app, ["plan", "demo", *arguments])


def test_the_command_says_what_fits():
    result = command("--gpus", "1", "--gpu-memory", "8", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert {
        *("fits", "gpus", "gpu_memory_gib", "per_gpu_gib", "checkpoint_gib"),
        *("hours", "gpu_hours", "remedy", "assumed"),
    } <= set(found)
    assert set(found["per_gpu_gib"]) == LINES
    assert found["fits"] is True
    assert isinstance(found["checkpoint_gib"], float)


def test_the_command_ends_with_three_where_it_does_not_fit():
    seven = ["--set", SEVEN, "-s", "model.dtype=bfloat16", "-s", "video.max_pixels=50176"]
    result = command("--gpus", "4", "--gpu-memory", "80", *seven)
    assert result.exit_code == 3, result.output
    assert "It does not fit" in result.output
    assert "--set training.distributed=fsdp2" in result.output
    nothing = command("--gpus", "1", "--gpu-memory", "4", *seven)
    assert nothing.exit_code == 3
    assert "No setting of the recipe makes it fit" in nothing.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "3", "--gpu-memory", "80"), "must divide evenly over 3 GPUs"),
        (("--gpus", "0", "--gpu-memory", "80"), "--gpus 0: must be at least 1"),
        (("--gpus", "1", "--gpu-memory", "0"), "--gpu-memory 0: must be GiB above 0"),
        (("--gpus", "1", "--gpu-memory", "8", "-s", "model.path=Qwen/Nobody"), "model.path='Qwen/Nobody'"),
        (
            ("--gpus", "1", "--gpu-memory", "8", "-s", "model.lora.target_modules=[qkv]"),
            "model.lora.target_modules: 'qkv'",
        ),
    ],
)
def test_mistakes_end_in_a_line(arguments, message):
    appo = [sys.executable, "-m", "appo.cli", "plan", "demo", *arguments]
    result = subprocess.run(appo, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_step_that_cannot_be_divided_is_refused():
    with pytest.raises(PlanError, match=r"training\.prompts_per_step=16 x policy\.num_generations=8"):
        fit(paper(), 7, 80)
