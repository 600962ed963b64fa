"""What a recipe says about an update reaches it: the KL term's form, the learning rate's schedule, several updates."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appo.config import RecipeError
from appo.policy import settings_for
from appo.training.arguments import training_arguments
from tests.training.conftest import Bench, largest_difference

pytestmark = pytest.mark.slow

TWO = ("training.updates_per_rollout=2", "training.max_steps=4", "training.save_every=2")


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every loss was made of; `grad` of the log-probabilities once it went backwards."""
    from appo.training.trainer import VideoGRPOTrainer

    seen: list[dict[str, Any]] = []
    scored = VideoGRPOTrainer._get_per_token_logps_and_entropies

    def keeping(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = scored(self, *args, **kwargs)
        if self._loss_inputs is not None:
            found[0].retain_grad()
            seen.append({"logps": found[0], **self._loss_inputs})
        return found

    monkeypatch.setattr(VideoGRPOTrainer, "_get_per_token_logps_and_entropies", keeping)
    return seen


@pytest.fixture
def moved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy starts away from its reference, and no reward moves it (after `bench`, whose rewards differ)."""
    from appo.training.trainer import VideoGRPOTrainer

    init = VideoGRPOTrainer.__init__

    def noisy(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self._policy().parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)

    monkeypatch.setattr(VideoGRPOTrainer, "__init__", noisy)
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": lambda *_: 1.0})


@pytest.mark.usefixtures("moved")
def test_the_form_of_the_kl_term_decides_its_gradient(bench: Bench, losses: list[dict[str, Any]]):
    """Its value is the same: with d = log p_ref - log p it is e^d - d - 1, and the ratio it may be multiplied by is 1.
    The gradient by log p is 1 - e^d of the one (k3) and -d of the other.
    """
    found = {}
    for form in ("k3", "bias_corrected"):
        bench.train("grpo", f"policy.kl={form}", "policy.beta=0.5", "training.max_steps=1", name=form)
        found[form] = losses.pop()
    assert bench.metrics("k3")[0]["kl"] == bench.metrics("bias_corrected")[0]["kl"] > 0.01
    for form, slope in (("k3", lambda d: 1 - d.exp()), ("bias_corrected", lambda d: -d)):
        seen = found[form]
        mask = seen["completion_mask"].bool()
        d = (seen["ref_per_token_logps"] - seen["logps"].detach())[mask]
        # GRPO averages over a completion's tokens, then over completions.
        share = 0.5 / (mask.sum(dim=1, keepdim=True) * len(mask)).expand_as(mask)[mask]
        torch.testing.assert_close(seen["logps"].grad[mask], slope(d) * share, rtol=1e-4, atol=1e-7)
    k3, corrected = (found[form]["logps"].grad for form in ("k3", "bias_corrected"))
    assert (k3 - corrected).norm() > 0.1 * k3.norm()


def test_k3_is_the_default_as_in_the_papers_baseline(bench: Bench):
    assert bench.recipe().policy.kl == "k3"
    for form in ("k3", "bias_corrected"):
        recipe = bench.recipe(f"policy.kl={form}")
        made = training_arguments(recipe, settings_for(recipe.policy), bench.folder, 0, num_prompts=32)
        assert made.use_bias_correction_kl == (form == "bias_corrected")


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]),
    ],
)
def test_the_learning_rate_follows_its_schedule(bench: Bench, schedule: str, shares: list[float]):
    few = "policy.max_completion_length=2"
    bench.train("dapo", "training.max_steps=4", f"training.lr_schedule={schedule}", few)
    assert [line["learning_rate"] for line in bench.metrics()] == pytest.approx([1e-3 * s for s in shares])


def test_recipes_of_the_paper_decay_linearly_and_the_demo_does_not():
    from appo.config import load_recipe, recipe_names

    found = {name: load_recipe(name).training.lr_schedule for name in recipe_names()}
    assert {name for name, schedule in found.items() if schedule == "constant"} == {"demo", "smoke"}
    assert set(found.values()) == {"constant", "linear"}


def test_a_schedule_goes_on_where_it_stood(bench: Bench):
    settings = ("training.lr_schedule=linear", "training.max_steps=4", "training.save_every=2")
    bench.train("dapo", *settings, name="straight")
    shutil.copytree(bench.folder / "straight", bench.folder / "resumed")
    for name in ("checkpoint", "checkpoints/checkpoint-4"):
        shutil.rmtree(bench.folder / "resumed" / name)
    assert bench.train("dapo", *settings, name="resumed").resumed_from == 2
    assert largest_difference(bench.weights("straight"), bench.weights("resumed")) == 0.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often rollouts are drawn, and APPO's weights computed."""
    from appo.training.perceiving import Perceiver
    from appo.training.trainer import VideoGRPOTrainer

    counted: Counter[str] = Counter()
    for kind, name in ((VideoGRPOTrainer, "_roll_out"), (Perceiver, "_weights")):

        def counting(self: Any, *args: Any, _method: Any = getattr(kind, name), _name: str = name) -> Any:
            counted[_name] += 1
            return _method(self, *args)

        monkeypatch.setattr(kind, name, counting)
    return counted


def test_two_updates_share_a_rollout_its_weights_and_its_old_probabilities(
    bench: Bench, losses: list[dict[str, Any]], calls: Counter[str]
):
    # Far enough for a ratio to leave the clip's bounds in the second update.
    summary = bench.train("appo", *TWO, "training.learning_rate=2e-2")
    assert "frame attention read in the scoring pass" in summary.active_parts
    assert calls == {"_roll_out": 2, "_weights": 2}
    assert len(losses) == 4
    lines = bench.metrics()
    for first, second in ((0, 1), (2, 3)):
        one, two = losses[first], losses[second]
        for name in ("completion_ids", "advantages", "old_per_token_logps"):
            assert torch.equal(one[name], two[name]), name
        assert one["advantages"].shape == one["completion_ids"].shape  # of APPO, token by token
        ratio = [(seen["logps"] - seen["old_per_token_logps"]).detach().exp() for seen in (one, two)]
        # Two passes of the same weights: rounding.
        torch.testing.assert_close(ratio[0], torch.ones_like(ratio[0]), rtol=0, atol=1e-4)
        assert (ratio[1] - 1).abs().max() > 0.2
        assert lines[first]["clip_ratio/region_mean"] == 0
        assert lines[second]["clip_ratio/region_mean"] > 0
        assert "reward" in lines[first]
        assert "reward" not in lines[second]  # drawn once, counted once
    assert not torch.equal(losses[0]["completion_ids"], losses[2]["completion_ids"])


def test_laws_hold_for_two_updates_too(bench: Bench):
    slow = (*TWO, "training.learning_rate=1e-4")
    bench.train("dapo", *slow, name="dapo")
    bench.train("appo", *slow, "perception.max_weight=1", name="unit")
    assert largest_difference(bench.weights("dapo"), bench.weights("unit")) == 0.0
    bench.train("appo", *slow, name="shared")
    bench.train("appo", *slow, "training.shared_prefix=false", "training.feature_cache=false", name="plain")
    bench.train("appo", *slow, "training.gradient_accumulation_steps=8", name="cut")
    for other in ("plain", "cut"):
        assert largest_difference(bench.weights("shared"), bench.weights(other)) < 2e-5
    assert largest_difference(bench.weights("shared"), bench.weights("dapo")) > 2e-5


def test_resumed_between_rollouts_equals_uninterrupted(bench: Bench):
    settings = (*TWO[:1], "training.save_every=2", "policy.dynamic_sampling=true")
    bench.train("appo", "training.max_steps=6", *settings, name="straight")
    bench.train("appo", "training.max_steps=2", *settings, name="resumed")
    assert bench.train("appo", "training.max_steps=6", *settings, name="resumed").resumed_from == 2
    assert largest_difference(bench.weights("straight"), bench.weights("resumed")) == 0.0


def test_a_signal_waits_for_a_rollouts_last_update():
    from appo.training.records import StopOnSignal

    stop = StopOnSignal()
    args = SimpleNamespace(device=torch.device("cpu"), num_iterations=2)
    stop._stop()
    found = []
    for step in (1, 2):
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        stop.on_step_end(args, SimpleNamespace(global_step=step), control)
        found.append((stop.stopped, control.should_save, control.should_training_stop))
    assert found == [(False,) * 3, (True,) * 3]


def test_a_checkpoint_between_two_updates_is_refused(bench: Bench):
    from appo.training.checkpoints import CheckpointMismatch

    bench.train("dapo", "training.max_steps=1", "training.save_every=1")
    named = r"checkpoint-1: lies between two updates .*updates_per_rollout=2\); take the number"
    with pytest.raises(CheckpointMismatch, match=named):
        bench.train("dapo", *TWO)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("save_every=3",), r"save_every=3: must be a multiple of training.updates_per_rollout=2.*give 2"),
        (("save_every=2", "max_steps=5"), r"max_steps=5: must be a multiple .*give 4"),
        (("save_every=1",), r"save_every=1: must be a multiple .*give 2"),
    ],
)
def test_steps_that_cut_a_rollout_in_two_are_refused(bench: Bench, settings: tuple[str, ...], named: str):
    with pytest.raises(RecipeError, match=named):
        bench.recipe("training.updates_per_rollout=2", *(f"training.{one}" for one in settings))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("clip_min=3",), r"clip_min=3: must be below vllm_importance_sampling_clip_max=3"),
        (("mode=token_truncate", "clip_max=null"), r"mode=token_truncate: needs a bound to cut to"),
        (("mode=everything",), r"vllm_importance_sampling_mode='everything'"),
        (("clip_max=0",), r"vllm_importance_sampling_clip_max=0: .*greater than 0"),
    ],
)
def test_bounds_of_importance_sampling_that_cannot_be_are_refused(bench: Bench, settings, named: str):
    with pytest.raises(RecipeError, match=named):
        bench.recipe(*(f"training.vllm_importance_sampling_{one}" for one in settings))


def test_importance_sampling_reaches_trl(bench: Bench):
    name = "training.vllm_importance_sampling_"
    recipe = bench.recipe(f"{name}mode=token_truncate", f"{name}clip_max=null", f"{name}clip_min=0.5")
    made = training_arguments(recipe, settings_for(recipe.policy), bench.folder, 0, num_prompts=32)
    prefix = "vllm_importance_sampling_"
    found = tuple(getattr(made, f"{prefix}{part}") for part in ("mode", "clip_max", "clip_min"))
    assert found == ("token_truncate", None, 0.5)
    made = training_arguments(bench.recipe(), settings_for(recipe.policy), bench.folder, 0, num_prompts=32)
    found = tuple(getattr(made, f"{prefix}{part}") for part in ("mode", "clip_max", "clip_min"))
    assert found == ("sequence_mask", 3.0, None)
