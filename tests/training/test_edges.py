"""The trainer at its edges: nothing to learn from, DAPO's switches at work, and what is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from appo.data.manifest import read_manifest
from appo.policy import settings_for
from appo.training.arguments import training_arguments
from tests.training.conftest import Bench, largest_difference, pseudo_accuracy

pytestmark = pytest.mark.slow


# 0.7 has no exact mean in float32: what is left of it, over TRL's 1e-4, was a gradient once.
@pytest.mark.parametrize(
    "reward", [0.0, 0.7, 1.0, None], ids=["all wrong", "all partly right", "all right", "no reward at all"]
)
def test_groups_without_differences_leave_the_weights_alone(bench: Bench, monkeypatch, reward):
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": lambda *_: reward})
    bench.train("appo", name="run")
    from safetensors.torch import load_file

    before = load_file(bench.model / "model.safetensors")
    after = bench.weights("run")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(line["loss"] == 0.0 for line in bench.metrics("run"))


def test_truncated_completions_are_masked_and_counted(bench: Bench):
    """An untrained model ends none of its completions: with the switch on nothing is left to learn from."""
    bench.train("dapo", name="off")
    bench.train("dapo", "policy.mask_truncated=true", name="on")
    assert all(
        line["completions/clipped_ratio"] == 1 for name in ("off", "on") for line in bench.metrics(name)
    )
    assert all(line["grad_norm"] > 0 for line in bench.metrics("off"))
    assert all(line["grad_norm"] == 0 for line in bench.metrics("on"))


def test_dynamic_sampling_stops_at_its_cap(bench: Bench, monkeypatch):
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": lambda *_: 1.0})
    bench.train("dapo", "policy.dynamic_sampling=true", "policy.dynamic_sampling_max_rounds=2")
    for line in bench.metrics():
        assert line["dynamic_sampling/rounds"] == 2
        assert line["dynamic_sampling/prompts_drawn"] == 8
        assert line["dynamic_sampling/groups_left"] == 4
        assert line["grad_norm"] == 0


def test_what_the_algorithm_asks_for_reaches_trl(bench: Bench):
    for name, expected in {
        "grpo": (0.2, 0.2, "grpo"),
        "dapo": (0.2, 0.28, "dapo"),
        "appo": (0.2, 0.28, "dapo"),
        "pa_grpo": (0.2, 0.2, "grpo"),
    }.items():
        recipe = bench.recipe(f"policy.algorithm={name}", "policy.mask_truncated=true")
        made = training_arguments(recipe, settings_for(recipe.policy), bench.folder, 0, num_prompts=32)
        assert (made.epsilon, made.epsilon_high, made.loss_type) == expected
        assert made.beta == 0, "TRL would make a reference model of its own; the trainer does"
        assert made.mask_truncated_completions
        assert made.scale_rewards == "group"


def test_a_punished_length_alone_is_no_reward(bench: Bench, monkeypatch):
    """What nobody graded teaches nothing, however long it is; beside a graded one its length counts."""
    punish = ("policy.overlong_buffer=8", "training.max_steps=1")
    # An untrained model never ends a completion: all of its lengths are equal.
    different = "appo.policy.overlong.soft_overlong_punishment"
    monkeypatch.setattr(different, lambda lengths, **_: -torch.linspace(0, 1, len(lengths)))
    ungraded = {"accuracy": lambda *_: None}
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: ungraded)
    bench.train("dapo", *punish, name="ungraded")
    graded = {"accuracy": lambda *_: 0.5}
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: graded)
    bench.train("dapo", *punish, name="graded")
    assert all(line["rewards/overlong/std"] > 0 for line in bench.metrics("ungraded"))
    assert bench.metrics("ungraded")[0]["grad_norm"] == 0
    assert bench.metrics("graded")[0]["grad_norm"] > 0


@pytest.mark.parametrize(
    "edge",
    [
        pytest.param(("policy.max_completion_length=1",), id="one-token completions"),
        pytest.param(("policy.mask_truncated=true",), id="all completions truncated and masked"),
        pytest.param(("policy.loss=grpo", "policy.beta=0.01"), id="mean per completion, with KL"),
        pytest.param(("policy.overlong_buffer=4",), id="soft overlong punishment"),
        pytest.param(("policy.dynamic_sampling=true",), id="dynamic sampling"),
        pytest.param(("model.freeze_vision=false",), id="trained vision tower"),
        pytest.param(("perception.fallback=all", "perception.divergence=released"), id="released variant"),
    ],
)
def test_edges_train_without_nan(bench: Bench, edge: tuple[str, ...]):
    bench.train("appo", *edge)
    assert all(torch.isfinite(tensor).all() for tensor in bench.weights().values())
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in bench.metrics())


def test_prompts_with_an_image_alone_have_weights_of_one(bench: Bench, monkeypatch):
    """A micro-batch may hold no video at all."""

    def without_videos(path):
        manifest = read_manifest(path)
        samples = tuple(
            replace(s, video=None, video_sha256=None, key_times=(), image="one.png") for s in manifest.samples
        )
        return replace(manifest, samples=samples)

    monkeypatch.setattr("appo.training.run.read_manifest", without_videos)
    picture = Image.linear_gradient("L").convert("RGB").resize((28, 28))
    monkeypatch.setattr("appo.data.frames.ShardFrames.image", lambda *_: picture)
    for algorithm in ("appo", "dapo"):
        bench.train(algorithm, name=algorithm)
    assert all(line["appo/weight_max"] == 1 for line in bench.metrics("appo"))
    assert largest_difference(bench.weights("appo"), bench.weights("dapo")) == 0


def test_dynamic_sampling_draws_again_for_groups_without_differences(bench: Bench, monkeypatch):
    """Half of the prompts are always right: with refill every group of a step has differing rewards."""

    def by_prompt(text: str, sample) -> float:
        return 1.0 if sum(sample.id.encode()) % 2 else pseudo_accuracy(text, None)

    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": by_prompt})
    rounds = "policy.dynamic_sampling_max_rounds=8"
    bench.train("dapo", "policy.dynamic_sampling=true", rounds, name="refilled")
    bench.train("dapo", name="plain")
    assert all(line["frac_reward_zero_std"] > 0 for line in bench.metrics("plain"))
    assert all(line["dynamic_sampling/groups_left"] == 0 for line in bench.metrics("refilled"))
    assert all(line["dynamic_sampling/prompts_drawn"] > 0 for line in bench.metrics("refilled"))


@pytest.mark.parametrize("spoiled", ["positions", "features"])
def test_training_does_not_start_when_generation_sees_something_else(bench: Bench, monkeypatch, spoiled: str):
    from appo.training import rollouts
    from appo.training.agreement import RolloutMismatch

    if spoiled == "positions":  # as other seconds per temporal patch would leave them
        run = rollouts.prefill

        def other(model, prompts, *args):
            doubled = torch.tensor([2, 1, 1])[:, None]
            return run(model, [replace(p, positions=p.positions * doubled) for p in prompts], *args)

        monkeypatch.setattr(rollouts, "prefill", other)
    else:
        seen = rollouts.vision_kwargs

        def others(*args):
            found = seen(*args)
            noise = torch.randn(
                found["pixel_values_videos"].shape, generator=torch.Generator().manual_seed(0)
            )
            return {**found, "pixel_values_videos": noise}

        monkeypatch.setattr(rollouts, "vision_kwargs", others)
    reason = "generation numbers" if spoiled == "positions" else "log-probabilities of the same tokens"
    with pytest.raises(RolloutMismatch, match=reason):
        bench.train("dapo")


def test_a_step_that_cannot_be_divided_is_refused(bench: Bench):
    with pytest.raises(ValueError, match=r"prompts_per_step=4 x policy.num_generations=4 .* 3 accumulation"):
        bench.train("dapo", "training.gradient_accumulation_steps=3")


def test_a_train_split_smaller_than_a_step_is_refused(bench: Bench):
    with pytest.raises(ValueError, match=r"training.prompts_per_step=64.*only 32"):
        bench.train("dapo", "training.prompts_per_step=64")
