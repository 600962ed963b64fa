"""Rollouts with vLLM inside training, for real: the CPU build, a tiny model, one engine for all trainings."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiers import long
from tests.training.conftest import Bench, largest_difference

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.slow

VLLM = ("training.rollout=vllm_colocate", "training.vllm_max_model_len=256", "training.learning_rate=1e-3")
BLOCK_TOKENS = 32  # the engine's prefix cache holds whole blocks of this size on a CPU
# float32 in two engines: log-probabilities differ in the fifth digit, over at most 8 tokens.
ABOVE_ONE = 5e-3
# Visual tokens are ruled out in rollouts, not in scoring; an untrained model gives them about a hundredth of its
# probability, so that the ratio of 8 tokens lies that many hundredths below one. A trained model gives them none.
BELOW_ONE = 0.2


@pytest.fixture(scope="module")
def engine(small_set: tuple[Path, Path]) -> Iterator[Any]:
    from appo.training.vllm_rollouts import ColocatedEngine
    from tests.training.conftest import OVERRIDES, load_recipe

    found = ColocatedEngine(str(small_set[1]), load_recipe("demo", [*OVERRIDES, *VLLM]), max_num_seqs=16)
    yield found
    found.close()


@pytest.fixture
def at_the_end(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Trainings use the shared engine, and call what is put into the list just before they let go of it."""
    from appo.training import vllm_rollouts

    calls: list[Any] = []
    monkeypatch.setattr(vllm_rollouts, "ColocatedEngine", lambda *_, **__: engine)
    monkeypatch.setattr(vllm_rollouts.VLLMRollouts, "close", lambda self: [call(self) for call in calls])
    return calls


def ratios_are_near_one(bench: Bench, name: str = "run") -> bool:
    ratio = "sampling/importance_sampling_ratio"
    return all(
        line[f"{ratio}/min"] > 1 - BELOW_ONE and line[f"{ratio}/max"] < 1 + ABOVE_ONE
        for line in bench.metrics(name)
    )


def comparing(seen: dict[str, Any]) -> Any:
    """Greedy tokens at the end: of vLLM with the weights of the step before, with the last ones, of transformers."""

    def compare(rollouts: Any) -> None:
        trainer = rollouts._trainer
        every = [trainer.store.get(row["sample_id"], trainer._policy()) for row in trainer.train_dataset]
        seen["lengths"], prompts = [len(prompt.ids) for prompt in every], every[:8]
        seen["stale"] = greedy(rollouts, prompts)
        rollouts._synchronise()
        seen["vllm"], seen["ours"] = greedy(rollouts, prompts), greedy_of_transformers(trainer, prompts)

    return compare


def greedy(rollouts: Any, prompts: list[Any]) -> list[list[int]]:
    sampling = replace(rollouts._trainer.sampling, temperature=0.0).for_vllm(seed=0) | {"logprobs": 0}
    found = rollouts._engine.generate(prompts, [sampling for _ in prompts])
    return [completion.tokens for (completion,) in found]


def greedy_of_transformers(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    from appo.training.rollouts import generate_groups

    trainer.model.eval()
    sampling = replace(trainer.sampling, temperature=0.0)
    return generate_groups(trainer.model, prompts, 1, sampling=sampling, device=torch.device("cpu"))


def test_appo_trains_on_vllms_rollouts_with_the_weights_of_every_step(
    bench: Bench, at_the_end: list[Any], monkeypatch: pytest.MonkeyPatch
):
    from appo.training.perceiving import Perceiver

    weighed: list[int] = []
    weigh = Perceiver._weights
    monkeypatch.setattr(Perceiver, "_weights", lambda *args: weighed.append(1) or weigh(*args))
    seen: dict[str, Any] = {}
    at_the_end.append(comparing(seen))
    threads = torch.get_num_threads()
    summary = bench.train("appo", "training.max_steps=3", *VLLM)
    assert "rollouts with vllm_colocate" in summary.active_parts
    assert "scoring pass" in summary.active_parts[-1]
    assert len(weighed) == 3, "a second time, in the update, they would multiply the advantages once more"
    assert seen["vllm"] == seen["ours"]
    assert seen["vllm"] != seen["stale"], "an update that changes no token shows nothing about synchronising"
    assert torch.get_num_threads() == threads
    # Three of four members of a group find the one whole block of their prompt.
    shortest, longest = min(seen["lengths"]), max(seen["lengths"])
    assert BLOCK_TOKENS < shortest <= longest <= 2 * BLOCK_TOKENS
    assert ratios_are_near_one(bench)
    for line in bench.metrics():
        share = line["rollout/prefix_cache_hit_share"]
        # The first member of a group may find blocks too, where prompts begin alike: one more in four.
        assert 3 / 4 * BLOCK_TOKENS / longest <= share <= BLOCK_TOKENS / shortest
        assert line["appo/weight_max"] >= 1


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param("model.freeze_vision=false", id="pixels, and a tower that trains"),
        pytest.param("model.lora={rank: 4}", id="adapters, merged on their way"),
    ],
)
def test_what_trains_reaches_vllm_whatever_it_is(bench: Bench, at_the_end: list[Any], settings: str):
    """Also features that vLLM's tower made under old weights must be forgotten."""
    seen: dict[str, Any] = {}
    at_the_end.append(comparing(seen))
    bench.train("dapo", "training.max_steps=3", *VLLM, "training.learning_rate=1e-2", settings)
    assert seen["vllm"] == seen["ours"]
    assert seen["vllm"] != seen["stale"]
    assert ratios_are_near_one(bench)


def test_features_filled_beforehand_are_all_that_vllm_sees_of_a_video(
    bench: Bench, at_the_end: list[Any], monkeypatch: pytest.MonkeyPatch
):
    from appo.data.frames import ShardFrames
    from appo.data.manifest import read_manifest
    from appo.training.feature_fill import fill

    place = f"training.feature_cache_dir={bench.folder / 'features'}"
    bench.train("appo", *VLLM, name="decoded")
    fill(bench.recipe(place), read_manifest(bench.manifest), str(bench.model), progress=False)

    def never(*_: Any) -> None:
        raise AssertionError("a frame was read, although every feature is stored")

    monkeypatch.setattr(ShardFrames, "load", never)
    bench.train("appo", *VLLM, place, name="filled")
    assert largest_difference(bench.weights("decoded"), bench.weights("filled")) == 0
    assert ratios_are_near_one(bench, "filled")


def test_runs_repeat_and_refill(bench: Bench, at_the_end: list[Any]):
    for name in ("once", "again"):
        bench.train("dapo", "policy.dynamic_sampling=true", *VLLM, name=name)
    assert bench.metrics("once")[0]["dynamic_sampling/rounds"] >= 0
    assert largest_difference(bench.weights("once"), bench.weights("again")) == 0.0


@pytest.mark.parametrize("spoiled", ["seconds", "features"])
def test_training_does_not_start_when_vllm_sees_something_else(
    bench: Bench, at_the_end: list[Any], monkeypatch: pytest.MonkeyPatch, spoiled: str
):
    from appo.training import vllm_rollouts
    from appo.training.agreement import RolloutMismatch

    def other(prompt: Any) -> Any:
        if spoiled == "seconds":
            return vllm_inputs.engine_input(replace(prompt, seconds_per_grid=prompt.seconds_per_grid * 2))
        features = torch.randn(prompt.video.features.shape, generator=torch.Generator().manual_seed(0))
        return vllm_inputs.engine_input(
            replace(prompt, video=replace(prompt.video, features=features, key="other"))
        )

    from appo.modeling import vllm_inputs

    monkeypatch.setattr(vllm_rollouts, "engine_input", other)
    reason = "vLLM numbers" if spoiled == "seconds" else "log-probabilities"
    with pytest.raises(RolloutMismatch, match=reason):
        bench.train("appo", *VLLM)


def test_every_prompt_is_compared_and_not_the_first_alone(
    bench: Bench, at_the_end: list[Any], monkeypatch: pytest.MonkeyPatch
):
    """Positions a patch off, as rounding of seconds once left a few videos in a hundred."""
    from appo.training.agreement import RolloutMismatch
    from appo.training.vllm_rollouts import VLLMRollouts

    roll_out, named = VLLMRollouts.roll_out, []

    def third_is_off(self: Any, prompts: Any, *args: Any) -> Any:
        third = prompts[2]
        named.append(third.sample.id)
        shifted = third.positions.clone()
        last = int((third.frame_of_token >= 0).nonzero()[-1])
        shifted[0, last] += 1
        return roll_out(self, [*prompts[:2], replace(third, positions=shifted), *prompts[3:]], *args)

    monkeypatch.setattr(VLLMRollouts, "roll_out", third_is_off)
    with pytest.raises(RolloutMismatch, match="vLLM numbers") as caught:
        bench.train("dapo", *VLLM)
    assert str(caught.value).startswith(f"sample {named[0]}: ")


def test_importance_sampling_is_bounded_as_the_recipe_says(bench: Bench, at_the_end: list[Any]):
    name = "training.vllm_importance_sampling_"
    bench.train("dapo", *VLLM, f"{name}mode=token_truncate", f"{name}clip_max=0.75", name="cut")
    bench.train("dapo", *VLLM, f"{name}mode=sequence_mask", f"{name}clip_max=0.01", name="masked")
    ratio = "sampling/importance_sampling_ratio"
    for line in bench.metrics("cut"):
        assert line[f"{ratio}/max"] == 0.75
        assert line[f"{ratio}/mean"] == pytest.approx(0.75)
        assert line["grad_norm"] > 0
    for line in bench.metrics("masked"):  # every completion lies above the bound
        assert line[f"{ratio}/max"] == 0
        assert line["grad_norm"] == 0


def test_two_updates_share_what_vllm_drew(bench: Bench, at_the_end: list[Any]):
    two = ("training.updates_per_rollout=2", "training.max_steps=4", "training.save_every=2")
    bench.train("appo", *VLLM, *two)
    drawn = [line for line in bench.metrics() if "rollout/prefix_cache_hit_share" in line]
    assert [line["step"] for line in drawn] == [1, 3]
    assert all("appo/weight_max" in line for line in drawn)


def test_a_prompt_that_is_too_long_is_named(bench: Bench, at_the_end: list[Any], engine: Any):
    engine._longest, kept = 20, engine._longest
    try:
        with pytest.raises(ValueError, match=r"training\.vllm_max_model_len=20"):
            bench.train("dapo", *VLLM)
    finally:
        engine._longest = kept


@long
def test_a_server_of_its_own_gets_features_and_the_weights_of_every_step(bench: Bench):
    from appo.training.vllm_server import serve_command

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = (
        "training.rollout=vllm_server",
        f"training.vllm_server_url=http://127.0.0.1:{port}",
        *VLLM[1:],
    )
    command, environment = serve_command(
        bench.recipe(*settings), str(bench.model), host="127.0.0.1", port=port
    )
    server = subprocess.Popen(command, env={**os.environ, **environment})
    try:
        summary = bench.train("appo", "training.max_steps=3", *settings)
    finally:
        server.terminate()
        server.wait(60)
    assert "rollouts with vllm_server" in summary.active_parts
    assert ratios_are_near_one(bench)
    assert all(line["rollout/prefix_cache_hit_share"] > 0 for line in bench.metrics())
    assert not any((bench.folder / "run" / "rollout_weights").iterdir())


def test_a_server_that_does_not_answer_is_named(bench: Bench, tmp_path: Path):
    from appo.training.vllm_server import ServedEngine, ServerError

    recipe = bench.recipe("training.rollout=vllm_server", "training.vllm_server_url=http://127.0.0.1:9")
    with pytest.raises(ServerError, match="vllm_server_url=http://127"):
        ServedEngine(recipe, tmp_path, accelerator=None, timeout_s=0.0)
