"""A step that meets NaN or infinity ends the training, named, and the checkpoint before it is what is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from appo.training.finite import NAMED, NotFinite
from tests.tiers import long
from tests.training.conftest import Bench, largest_difference, pseudo_accuracy
from tests.training.test_distributed import launched

pytestmark = pytest.mark.slow

BROKEN_STEP = 3
FOUR = ("training.max_steps=4", "training.save_every=1")


@contextmanager
def broken_hidden(trainer: Any, column: int) -> Iterator[None]:
    """NaN in the hidden states of the first row's token at `column`, as a broken layer leaves them."""
    from appo.modeling.features import base_model

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.clone()
        output.last_hidden_state[0, column] = math.nan
        return output

    handle = base_model(trainer._policy()).language_model.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()


def wrapped(name: str, spoil: Callable[[Any], Any], when: Callable[[Any], bool] = lambda _: True) -> Callable:
    """A patch of a trainer's method that runs inside `spoil(trainer)`, in the broken step alone."""

    def install(patch: pytest.MonkeyPatch) -> None:
        from appo.training.trainer import VideoGRPOTrainer

        method = getattr(VideoGRPOTrainer, name)

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step != BROKEN_STEP - 1 or not when(self):
                return method(self, *args, **kwargs)
            with spoil(self):
                return method(self, *args, **kwargs)

        patch.setattr(VideoGRPOTrainer, name, broken)

    return install


def rewarding(value: float) -> Callable[[pytest.MonkeyPatch], None]:
    """The reward of one completion of the broken step, whichever function gives it."""

    def install(patch: pytest.MonkeyPatch) -> None:
        calls = [0]
        size = 16  # completions of a step; two groups are looked at before the first

        def reward(text: str, sample: Any) -> float:
            calls[0] += 1
            return value if calls[0] == 8 + 2 * size + 6 else pseudo_accuracy(text, sample)

        patch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": reward})

    return install


@contextmanager
def broken_gradient(trainer: Any) -> Iterator[None]:
    parameter = next(p for p in trainer._policy().parameters() if p.requires_grad)
    handle = parameter.register_hook(lambda gradient: gradient * math.inf)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def broken_advantages(trainer: Any) -> Iterator[None]:
    trainer._buffered_inputs[0]["advantages"][5] = math.nan
    yield


def in_loss(trainer: Any) -> bool:
    return trainer._loss_inputs is not None


LOGPS = "_get_per_token_logps_and_entropies"
SPLIT = ("training.gradient_accumulation_steps=8",)  # half a group a micro-batch: attention has its own pass
# How the step is broken, in which phase that is found, and whether it is one prompt's alone.
BREAKS = {
    "hidden states of a rollout": (
        wrapped("_roll_out", lambda t: broken_hidden(t, -1)),
        r"rollout: probabilities to draw from are not finite; prompts: \S+\n",
        (),
    ),
    "an infinite reward": (rewarding(math.inf), r"rewards: accuracy is not finite; prompts: \S+\n", ()),
    "a reward that is no number": (
        rewarding(math.nan),
        r"rewards: accuracy is not finite; prompts: \S+\n",
        (),
    ),
    "hidden states of the reference pass": (
        wrapped(LOGPS, lambda t: broken_hidden(t, -1), lambda t: not in_loss(t)),
        r"scoring: log-probabilities are not finite; prompts: \S+\n",
        ("policy.beta=0.01", "model.lora={rank: 4}"),
    ),
    "hidden states of the attention's own pass": (
        wrapped("score_rows", lambda t: broken_hidden(t, -1), lambda t: not in_loss(t)),
        r"attention: log-probabilities are not finite; prompts: \S+, \S+, \S+, \S+\n",
        SPLIT,
    ),
    "hidden states of the update": (
        wrapped(LOGPS, lambda t: broken_hidden(t, -1), in_loss),
        r"update: log-probabilities are not finite; prompts: \S+\n",
        (),
    ),
    "the loss": (
        wrapped("_compute_loss", broken_advantages),
        r"update: the loss is not finite; prompts: \S+, \S+, \S+, \S+\n",
        (),
    ),
    "the gradient": (
        wrapped("training_step", broken_gradient),
        r"update: the gradient's norm is not finite; prompts: \S+, \S+, \S+, \S+\n",
        (),
    ),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_the_step_stops_and_leaves_the_checkpoint_before_it(bench: Bench, broken: str):
    install, message, settings = BREAKS[broken]
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        with pytest.raises(NotFinite, match=rf"^step {BROKEN_STEP}, {message}.*checkpoint-2 is as it was"):
            bench.train("appo", *FOUR, *settings)
    checkpoints = bench.folder / "run" / "checkpoints"
    assert not (checkpoints / f"checkpoint-{BROKEN_STEP}").exists()
    assert [line["step"] for line in bench.metrics()] == [1, 2]
    assert not (bench.folder / "run" / "checkpoint").exists()


def test_the_training_goes_on_from_there_as_if_nothing_had_been(bench: Bench):
    install, *_ = BREAKS["the gradient"]
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        with pytest.raises(NotFinite):
            bench.train("appo", *FOUR)
    assert bench.train("appo", *FOUR).resumed_from == 2
    bench.train("appo", *FOUR, name="straight")
    assert largest_difference(bench.weights(), bench.weights("straight")) == 0.0


def test_rollouts_of_an_engine_are_asked_too(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """vLLM draws from anything; what it drew from is in the log-probabilities that come with the tokens."""
    from appo.training.trainer import VideoGRPOTrainer

    roll_out = VideoGRPOTrainer._roll_out

    def broken(self: Any, size: int) -> Any:
        tokens, _ = roll_out(self, size)
        logps = [[-1.0] * len(own) for own in tokens]
        logps[9][2] = math.nan
        return tokens, logps

    monkeypatch.setattr(VideoGRPOTrainer, "_roll_out", broken)
    with pytest.raises(
        NotFinite, match=r"^step 1, rollout: .*prompts: \S+\nno checkpoint was written before"
    ):
        bench.train("dapo", *FOUR)


def test_a_missing_reward_is_no_broken_one(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    none = {"accuracy": lambda text, _: None if len(text) % 2 else pseudo_accuracy(text, None)}
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: none)
    assert bench.train("appo").steps == 2


def test_many_prompts_are_counted_and_some_named():
    from appo.training.finite import BrokenDistribution

    error = BrokenDistribution([f"s{i}" for i in range(NAMED + 3)])
    assert f"s{NAMED - 1} and 3 more: " in str(error)
    assert f"s{NAMED}" not in str(error)


ONE_IS_BROKEN = """
import math, os
from appo.training.trainer import VideoGRPOTrainer
scored = VideoGRPOTrainer.score_rows
def score_rows(self, model, rows, *args, **kwargs):
    found = scored(self, model, rows, *args, **kwargs)
    if os.environ["RANK"] == "1" and self.state.global_step == 1:
        found.logps.detach()[0, 0] = math.nan
    return found
VideoGRPOTrainer.score_rows = score_rows
"""


@long
def test_all_processes_stop_together_when_one_of_them_is_broken(bench: Bench):
    """Or the others would wait for it in their next gathering until a watchdog kills them."""
    said = launched(bench, "two", *FOUR, before=ONE_IS_BROKEN, fails=True)
    assert said.count("step 2, update: log-probabilities are not finite; prompts: ") >= 2, said[-3000:]
    assert checkpoints(bench, "two") == ["checkpoint-1"]


def checkpoints(bench: Bench, name: str) -> list[str]:
    return [path.name for path in (bench.folder / name / "checkpoints").glob("checkpoint-*")]


ONE_GRADIENT_IS_BROKEN = """
import math, os
import torch
from tests.cpu_layouts import assert_ran, install
install()
from appo.training.trainer import VideoGRPOTrainer
class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()
    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf
lost = VideoGRPOTrainer._compute_loss
def _compute_loss(self, *args, **kwargs):
    assert_ran(self, self.recipe.training.distributed)
    loss = lost(self, *args, **kwargs)
    return Broken.apply(loss) if os.environ["RANK"] == "1" and self.state.global_step == 1 else loss
VideoGRPOTrainer._compute_loss = _compute_loss
"""


@long
@pytest.mark.parametrize("layout", ["fsdp2", "zero2", "zero3"])
def test_a_broken_gradient_stops_every_layout(bench: Bench, layout: str):
    """DeepSpeed steps before anybody is asked; what it spoils is never saved."""
    from tests.cpu_layouts import lifted

    with lifted():
        sharded = (f"training.distributed={layout}", "model.dtype=bfloat16")
        said = launched(bench, layout, *FOUR, *sharded, before=ONE_GRADIENT_IS_BROKEN, fails=True)
    assert "step 2, update: the gradient's norm is not finite; prompts: " in said, said[-3000:]
    assert checkpoints(bench, layout) == ["checkpoint-1"]
