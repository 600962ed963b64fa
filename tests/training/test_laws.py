"""Laws of the trainer: what must not change the result, and the parent algorithm that must come back."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.conftest import Bench, largest_difference

# Adam divides by the gradient's own size, so rounding of a gradient near zero can move a weight by part of a step:
# two steps of 1e-3 leave differences well under a hundredth of what training moved.
CLOSE = 2e-5

pytestmark = pytest.mark.slow


def test_unit_weights_give_back_dapo_exactly(bench: Bench):
    bench.train("dapo", name="dapo")
    bench.train("appo", "perception.max_weight=1", name="appo")
    assert largest_difference(bench.weights("dapo"), bench.weights("appo")) == 0.0


def test_weights_above_one_change_the_training(bench: Bench):
    """The counterpart: without it, the law above would hold for a trainer that ignores its weights."""
    bench.train("dapo", name="dapo")
    bench.train("appo", name="appo")
    assert largest_difference(bench.weights("dapo"), bench.weights("appo")) > 10 * CLOSE
    assert any(line["appo/weight_max"] > 1 for line in bench.metrics("appo"))
    for line in bench.metrics("appo"):  # every step says how the weights are spread
        shares = {name: value for name, value in line.items() if name.startswith("weights/share_")}
        assert len(shares) == 11
        assert math.isclose(sum(shares.values()), 1.0, abs_tol=1e-3)
        assert (shares["weights/share_1.00"] < 1) == (line["appo/weight_max"] > 1)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "appo", "pa_grpo"])
def test_sharing_prefix_and_features_changes_nothing(bench: Bench, algorithm: str):
    steps = "training.max_steps=20" if algorithm == "appo" else "training.max_steps=3"
    bench.train(algorithm, steps, "training.learning_rate=1e-4", name="shared")
    off = ("training.shared_prefix=false", "training.feature_cache=false")
    bench.train(algorithm, steps, "training.learning_rate=1e-4", *off, name="plain")
    assert largest_difference(bench.weights("shared"), bench.weights("plain")) < CLOSE
    for ours, plain in zip(bench.metrics("shared"), bench.metrics("plain"), strict=True):
        assert ours["reward"] == plain["reward"]
        # Both logs round to four digits
        assert math.isclose(ours["loss"], plain["loss"], abs_tol=2e-4)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("training.gradient_accumulation_steps=2",), id="two groups a micro-batch"),
        pytest.param(("training.gradient_accumulation_steps=8",), id="half a group a micro-batch"),
    ],
)
def test_the_cut_into_micro_batches_changes_nothing(bench: Bench, layout: tuple[str, ...]):
    whole = bench.train("appo", name="whole")
    cut = bench.train("appo", *layout, name="cut")
    assert largest_difference(bench.weights("whole"), bench.weights("cut")) < CLOSE
    assert "update's own forward" in whole.active_parts[-1]
    if "8" in layout[0]:
        assert "scoring pass" in cut.active_parts[-1]


def test_the_reference_pass_is_not_read_for_the_policys(bench: Bench):
    """Under LoRA the reference is the policy's own model with its adapters off, and runs before the update too."""
    settings = ("policy.perception_weights=true", "model.lora={rank: 4}", "training.max_steps=3")
    whole = bench.train("grpo", *settings, "training.learning_rate=1e-2", name="whole")
    half = "training.gradient_accumulation_steps=8"
    cut = bench.train("grpo", *settings, "training.learning_rate=1e-2", half, name="cut")
    assert "update's own forward" in whole.active_parts[-1]
    assert "scoring pass" in cut.active_parts[-1]
    ours, theirs = bench.weights("whole"), bench.weights("cut")
    assert all(line["kl"] > 0 for line in bench.metrics("cut")[1:])
    assert largest_difference(ours, theirs) < 10 * CLOSE


def test_checkpoints_interchange_and_resume_equals_uninterrupted_bit_for_bit(bench: Bench):
    settings = ("training.save_every=2", "policy.dynamic_sampling=true")
    bench.train("appo", "training.max_steps=5", *settings, name="straight")
    bench.train("appo", "training.max_steps=2", *settings, name="resumed")
    summary = bench.train("appo", "training.max_steps=5", *settings, name="resumed")
    assert summary.resumed_from == 2
    assert largest_difference(bench.weights("straight"), bench.weights("resumed")) == 0.0
    steps = [line["step"] for line in bench.metrics("resumed")]
    assert steps == [1, 2, 3, 4, 5], "no step twice, none missing"


def test_resume_in_a_later_epoch_sees_the_same_prompts(bench: Bench):
    """32 prompts, 4 a step: step 9 starts the second epoch, with an order of its own."""
    settings = ("training.save_every=10", "policy.max_completion_length=2")
    bench.train("dapo", "training.max_steps=11", *settings, name="straight")
    bench.train("dapo", "training.max_steps=10", *settings, name="resumed")
    bench.train("dapo", "training.max_steps=11", *settings, name="resumed")
    assert largest_difference(bench.weights("straight"), bench.weights("resumed")) == 0.0


def test_a_half_written_checkpoint_is_never_resumed_from(bench: Bench):
    from appo.training.records import MARKER

    bench.train("dapo", "training.max_steps=2", "training.save_every=1", name="run")
    (bench.folder / "run" / "checkpoints" / "checkpoint-2" / MARKER).unlink()
    summary = bench.train("dapo", "training.max_steps=2", "training.save_every=1", name="run")
    assert summary.resumed_from == 1


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


def test_dynamic_sampling_draws_again_for_groups_without_differences(bench: Bench, monkeypatch):
    """Half of the prompts are always right: with refill every group of a step has differing rewards."""

    def by_prompt(text: str, sample) -> float:
        return 1.0 if sum(sample.id.encode()) % 2 else pseudo(text)

    from tests.training.conftest import pseudo_accuracy as pseudo_of

    def pseudo(text: str) -> float:
        return pseudo_of(text, None)

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
        whole = rollouts.left_padded

        def other(*args):
            ids, mask, positions = whole(*args)
            return ids, mask, positions * torch.tensor([2, 1, 1])[:, None, None]

        monkeypatch.setattr(rollouts, "left_padded", other)
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
