"""Laws of the trainer: what must not change the result, and the parent algorithm that must come back."""

from __future__ import annotations

import math

import pytest
import torch

from appo.policy.advantages import group_advantages
from tests.tiers import LONG
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
    settings = (f"training.max_steps={20 if LONG else 6}", "training.learning_rate=1e-4")
    bench.train(algorithm, *settings, name="shared")
    bench.train(algorithm, *settings, *PLAIN, name="plain")
    # Twenty steps of 1e-4 move a weight by up to 2e-3.
    assert largest_difference(bench.weights("shared"), bench.weights("plain")) < 2 * CLOSE
    for ours, plain in zip(bench.metrics("shared"), bench.metrics("plain"), strict=True):
        assert ours["reward"] == plain["reward"]
        # Both logs round to four digits
        assert math.isclose(ours["loss"], plain["loss"], abs_tol=2e-4)


@pytest.mark.parametrize("algorithm", ["dapo", "appo"])
def test_sharing_changes_nothing_for_refilled_groups_either(bench: Bench, monkeypatch, algorithm: str):
    """A refilled group takes the number of the place it fills: with that of the batch it was drawn in, it would be
    packed with another group, behind that one's prompt.
    """

    def by_prompt(text: str, sample: object) -> float:
        # Half of the prompts teach nothing; more than one group of a step is refilled.
        return 1.0 if sum(sample.id.encode()) % 2 else float(sum(text.encode()) % 3 == 0)

    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": by_prompt})
    settings = ("policy.dynamic_sampling=true", "training.max_steps=6", "training.learning_rate=1e-4")
    bench.train(algorithm, *settings, name="shared")
    bench.train(algorithm, *settings, *PLAIN, name="plain")
    assert sum(line["dynamic_sampling/prompts_drawn"] for line in bench.metrics("shared")) >= 4
    assert largest_difference(bench.weights("shared"), bench.weights("plain")) < CLOSE


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
        assert "scoring pass of its own (groups are split)" in cut.active_parts[-1]


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


def test_every_epoch_sees_every_prompt_once_in_an_order_of_its_own(bench: Bench, monkeypatch):
    """Through accelerate's loader, which tells the sampler which epoch it is."""
    from appo.training.trainer import VideoGRPOTrainer

    drawn: list[str] = []
    draw = VideoGRPOTrainer.draw

    def keeping(self, inputs):
        drawn.extend(row["sample_id"] for row in inputs[:: self.num_generations])
        return draw(self, inputs)

    monkeypatch.setattr(VideoGRPOTrainer, "draw", keeping)
    few = ("policy.max_completion_length=1", "training.save_every=100")
    bench.train("dapo", "training.max_steps=24", *few)
    epochs = [drawn[start : start + 32] for start in (0, 32, 64)]
    assert len(drawn) == 96
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(epochs[0])) == 32
    # By chance two orders agree in one place of 32; an order that stays, or is only turned, in all.
    for one, other in ((0, 1), (1, 2), (0, 2)):
        for shift in range(32):
            turned = [*epochs[other][shift:], *epochs[other][:shift]]
            assert sum(a == b for a, b in zip(epochs[one], turned, strict=True)) < 10


def test_the_order_of_an_epoch_depends_on_its_number_and_the_seed_alone():
    from appo.training.sampler import EpochRepeatSampler

    def order(seed: int, *epochs: int) -> list[int]:
        sampler = EpochRepeatSampler(range(64), mini_repeat_count=1, batch_size=4, seed=seed)
        found: list[int] = []
        for epoch in epochs:
            sampler.set_epoch(epoch)
            found = list(sampler)
        return found

    assert order(0, 2) == order(0, 0, 1, 2)
    orders = [order(seed, epoch) for seed in (0, 100) for epoch in range(4)]
    assert all(sorted(one) == list(range(64)) for one in orders)
    assert len({tuple(one) for one in orders}) == 8


def test_a_half_written_checkpoint_is_never_resumed_from(bench: Bench):
    from appo.training.checkpoints import MARKER

    bench.train("dapo", "training.max_steps=2", "training.save_every=1", name="run")
    (bench.folder / "run" / "checkpoints" / "checkpoint-2" / MARKER).unlink()
    summary = bench.train("dapo", "training.max_steps=2", "training.save_every=1", name="run")
    assert summary.resumed_from == 1
