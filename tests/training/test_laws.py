"""Laws of the trainer: what must not change the result, and the parent algorithm that must come back."""

from __future__ import annotations

import math

import pytest
import torch

from appo.policy import settings_for
from appo.policy.advantages import group_advantages
from appo.training.arguments import training_arguments
from tests.training.conftest import Bench, largest_difference

# Adam divides by the gradient's own size, so rounding of a gradient near zero can move a weight by part of a step:
# two steps of 1e-3 leave differences well under a hundredth of what training moved.
CLOSE = 2e-5
PLAIN = ("training.shared_prefix=false", "training.feature_cache=false")

pytestmark = pytest.mark.slow


@pytest.fixture
def observing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model observes nothing: the first three tokens of a completion stand for <observation>, and a
    checksum for what a judge says of them, with every seventh verdict late.
    """

    def masks(pieces: list[list[bytes]], num_tokens: int) -> dict[str, torch.Tensor]:
        return {"observation": (torch.arange(num_tokens) < 3).expand(len(pieces), -1)}

    def verdicts(_judge, texts: list[str], _samples) -> list[float | None]:
        sums = [sum(text.encode()) for text in texts]
        return [None if value % 7 == 0 else float(value % 2) for value in sums]

    monkeypatch.setattr("appo.training.trainer.tag_masks", masks)
    monkeypatch.setattr("appo.policy.judge.perception_rewards", verdicts)


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
@pytest.mark.usefixtures("observing")
def test_sharing_prefix_and_features_changes_nothing(bench: Bench, algorithm: str):
    settings = ("training.max_steps=20", "training.learning_rate=1e-4")
    bench.train(algorithm, *settings, name="shared")
    bench.train(algorithm, *settings, *PLAIN, name="plain")
    # Twenty steps of 1e-4 move a weight by up to 2e-3.
    assert largest_difference(bench.weights("shared"), bench.weights("plain")) < 2 * CLOSE
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


@pytest.mark.usefixtures("observing")
def test_pa_grpo_trains_each_part_by_its_own_reward_and_takes_appos_weights(bench: Bench, monkeypatch):
    from appo.training.trainer import VideoGRPOTrainer

    seen: list[dict[str, torch.Tensor]] = []
    made = VideoGRPOTrainer._generate_and_score_completions

    def keeping(self, inputs):
        output = made(self, inputs)
        seen.append({"advantages": output["advantages"], **self.rollouts.rewards})
        return output

    monkeypatch.setattr(VideoGRPOTrainer, "_generate_and_score_completions", keeping)
    bench.train("pa_grpo", name="plain")
    for batch in seen:
        observed, reasoned = batch["advantages"][:, :3], batch["advantages"][:, 3:]
        for part, rewards in ((observed, batch["perception"]), (reasoned, batch["accuracy"])):
            expected = group_advantages(rewards, 4)
            assert torch.equal(part, expected[:, None].expand_as(part))
        assert (observed[batch["perception"].isnan()] == 0).all()
    assert any(batch["perception"].isnan().any() for batch in seen)
    assert any((batch["advantages"][:, 0] != batch["advantages"][:, 3]).any() for batch in seen)

    product = "policy.perception_weights=true"
    bench.train("pa_grpo", product, "perception.max_weight=1", name="unit")
    bench.train("pa_grpo", product, name="weighted")
    assert largest_difference(bench.weights("plain"), bench.weights("unit")) == 0.0
    assert largest_difference(bench.weights("plain"), bench.weights("weighted")) > 10 * CLOSE


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


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param((), id="whole model"),
        pytest.param(("model.lora={rank: 4}", "policy.beta=0.01"), id="adapters and a reference"),
    ],
)
def test_resume_equals_uninterrupted_bit_for_bit(bench: Bench, kind: tuple[str, ...]):
    settings = ("training.save_every=2", "policy.dynamic_sampling=true", *kind)
    bench.train("appo", "training.max_steps=5", *settings, name="straight")
    bench.train("appo", "training.max_steps=2", *settings, name="resumed")
    summary = bench.train("appo", "training.max_steps=5", *settings, name="resumed")
    assert summary.resumed_from == 2
    assert largest_difference(bench.weights("straight"), bench.weights("resumed")) == 0.0
    steps = [line["step"] for line in bench.metrics("resumed")]
    assert steps == [1, 2, 3, 4, 5], "no step twice, none missing"


@pytest.mark.parametrize(("before", "after"), [((), PLAIN), (PLAIN, ())], ids=["on to off", "off to on"])
def test_checkpoints_interchange(bench: Bench, before: tuple[str, ...], after: tuple[str, ...]):
    """A training saved with the shared prefix and the cache goes on without them, and the other way round."""
    settings = ("training.save_every=2", "training.learning_rate=1e-4")
    bench.train("appo", "training.max_steps=4", *settings, name="straight")
    bench.train("appo", "training.max_steps=2", *settings, *before, name="changed")
    summary = bench.train("appo", "training.max_steps=4", *settings, *after, name="changed")
    assert summary.resumed_from == 2
    assert ("shared prefix on" in summary.active_parts) == (after == ())
    assert largest_difference(bench.weights("straight"), bench.weights("changed")) < CLOSE


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("training.gradient_checkpointing=true", id="gradient checkpointing"),
        pytest.param("model.lora={rank: 4}", id="adapters"),
        pytest.param("model.freeze_vision=false", id="trained vision tower"),
    ],
)
def test_the_shared_prefix_changes_nothing_in_any_kind_of_training(bench: Bench, kind: str):
    bench.train("appo", kind, "training.learning_rate=1e-4", name="shared")
    bench.train("appo", kind, "training.learning_rate=1e-4", *PLAIN, name="plain")
    assert largest_difference(bench.weights("shared"), bench.weights("plain")) < CLOSE


def test_a_tower_that_trains_encodes_each_video_once_per_group(bench: Bench, monkeypatch):
    from appo.training import scoring

    encoded, counted = scoring.vision_kwargs, []

    def counting(prompts, *args):
        found = encoded(prompts, *args)
        assert "vision_is_encoded" not in found, "features of a tower that trains must not be kept"
        counted.append(len(found["video_grid_thw"]))
        return found

    monkeypatch.setattr(scoring, "vision_kwargs", counting)
    trained = ("model.freeze_vision=false", "training.max_steps=1")
    for shared, videos in (("true", 4), ("false", 16)):  # four groups of four completions
        bench.train("dapo", *trained, f"training.shared_prefix={shared}", name=shared)
        assert max(counted) == videos
        counted.clear()


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
        "grpo": (0.01, 0.2, 0.2, "grpo"),
        "dapo": (0.0, 0.2, 0.28, "dapo"),
        "appo": (0.0, 0.2, 0.28, "dapo"),
        "pa_grpo": (0.01, 0.2, 0.2, "grpo"),
    }.items():
        recipe = bench.recipe(f"policy.algorithm={name}", "policy.mask_truncated=true")
        made = training_arguments(recipe, settings_for(recipe.policy), bench.folder, 0, num_prompts=32)
        assert (made.beta, made.epsilon, made.epsilon_high, made.loss_type) == expected
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
