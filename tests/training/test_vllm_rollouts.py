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

from tests.training.conftest import Bench, largest_difference

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = pytest.mark.slow

VLLM = ("training.rollout=vllm_colocate", "training.vllm_max_model_len=256", "training.learning_rate=1e-3")
BLOCK_TOKENS = 32  # the engine's prefix cache holds whole blocks of this size on a CPU
# float32 in two engines: log-probabilities differ in the fifth digit, over at most 8 tokens.
NEAR_ONE = 5e-3


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


def greedy(rollouts: Any, prompts: list[Any]) -> list[list[int]]:
    found = rollouts._engine.generate(
        prompts, [rollouts._sampling(n=1, seed=0, temperature=0.0) for _ in prompts]
    )
    return [completion.tokens for (completion,) in found]


def greedy_of_transformers(trainer: Any, prompts: list[Any]) -> list[list[int]]:
    from transformers import GenerationConfig

    from appo.training.rollouts import generate_groups, placeholder_tokens

    config = GenerationConfig(
        max_new_tokens=trainer.max_completion_length,
        do_sample=False,
        eos_token_id=trainer.eos_token_ids,
        pad_token_id=trainer._tokenizer.pad_token_id,
        suppress_tokens=placeholder_tokens(trainer.model),
    )
    trainer.model.eval()
    return generate_groups(
        trainer.model,
        prompts,
        1,
        generation_config=config,
        pad_token_id=trainer._tokenizer.pad_token_id,
        device=torch.device("cpu"),
    )


def test_appo_trains_on_vllms_rollouts_with_the_weights_of_every_step(bench: Bench, at_the_end: list[Any]):
    seen: dict[str, Any] = {}

    def compare(rollouts: Any) -> None:
        trainer = rollouts._trainer
        prompts = [trainer.store.get(row["sample_id"], trainer.model) for row in trainer.train_dataset][:8]
        seen["stale"] = greedy(rollouts, prompts)  # the engine has the weights of the step before
        rollouts._synchronise()
        seen["vllm"], seen["ours"] = greedy(rollouts, prompts), greedy_of_transformers(trainer, prompts)
        seen["length"] = len(prompts[0].ids)

    at_the_end.append(compare)
    threads = torch.get_num_threads()
    summary = bench.train("appo", "training.max_steps=3", *VLLM)
    assert "rollouts with vllm_colocate" in summary.active_parts
    assert "scoring pass" in summary.active_parts[-1]
    assert seen["vllm"] == seen["ours"]
    assert seen["vllm"] != seen["stale"], "an update that changes no token shows nothing about synchronising"
    assert torch.get_num_threads() == threads
    # Three of four members of a group find all whole blocks of their prompt.
    whole_blocks = (seen["length"] - 1) // BLOCK_TOKENS * BLOCK_TOKENS
    for line in bench.metrics():
        ratio = "sampling/importance_sampling_ratio"
        assert abs(line[f"{ratio}/min"] - 1) < NEAR_ONE
        assert abs(line[f"{ratio}/max"] - 1) < NEAR_ONE
        assert line["rollout/prefix_cache_hit_share"] == pytest.approx(
            3 * whole_blocks / (4 * seen["length"])
        )
        assert line["appo/weight_max"] >= 1


def test_pixels_of_a_tower_that_trains_reach_vllm_too(bench: Bench, at_the_end: list[Any]):
    """Encoder results of old weights must be forgotten: ratios stay at one after the tower has moved."""
    bench.train("dapo", "training.max_steps=3", "model.freeze_vision=false", *VLLM, name="unfrozen")
    for line in bench.metrics("unfrozen"):
        assert abs(line["sampling/importance_sampling_ratio/min"] - 1) < NEAR_ONE


def test_runs_repeat_and_refill(bench: Bench, at_the_end: list[Any]):
    for name in ("once", "again"):
        bench.train("dapo", "policy.dynamic_sampling=true", *VLLM, name=name)
    assert bench.metrics("once")[0]["dynamic_sampling/rounds"] >= 0
    assert largest_difference(bench.weights("once"), bench.weights("again")) == 0.0


def test_adapters_are_merged_on_their_way(bench: Bench, at_the_end: list[Any]):
    bench.train("dapo", "training.max_steps=3", "model.lora={rank: 4}", *VLLM, name="lora")
    assert abs(bench.metrics("lora")[-1]["sampling/importance_sampling_ratio/min"] - 1) < NEAR_ONE


@pytest.mark.parametrize("spoiled", ["seconds", "features"])
def test_training_does_not_start_when_vllm_sees_something_else(
    bench: Bench, at_the_end: list[Any], monkeypatch: pytest.MonkeyPatch, spoiled: str
):
    from appo.training import vllm_rollouts

    def other(prompt: Any) -> Any:
        if spoiled == "seconds":
            return vllm_inputs.engine_input(replace(prompt, seconds_per_grid=prompt.seconds_per_grid * 2))
        features = torch.randn(prompt.video.features.shape, generator=torch.Generator().manual_seed(0))
        return vllm_inputs.engine_input(
            replace(prompt, video=replace(prompt.video, features=features, key="other"))
        )

    from appo.modeling import vllm_inputs

    monkeypatch.setattr(vllm_rollouts, "engine_input", other)
    reason = "numbers" if spoiled == "seconds" else "log-probabilities"
    with pytest.raises(vllm_rollouts.RolloutMismatch, match=reason):
        bench.train("appo", *VLLM)


def test_a_prompt_that_is_too_long_is_named(bench: Bench, at_the_end: list[Any], engine: Any):
    engine._longest, kept = 20, engine._longest
    try:
        with pytest.raises(ValueError, match=r"training\.vllm_max_model_len=20"):
            bench.train("dapo", *VLLM)
    finally:
        engine._longest = kept


@pytest.mark.skipif(
    not os.environ.get("APPO_TEST_VLLM_SERVER"),
    reason="starts a vLLM server, a minute or two on two cores: set APPO_TEST_VLLM_SERVER=1",
)
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
    for line in bench.metrics():
        ratio = "sampling/importance_sampling_ratio"
        assert abs(line[f"{ratio}/min"] - 1) < NEAR_ONE
        assert abs(line[f"{ratio}/max"] - 1) < NEAR_ONE
        assert line["rollout/prefix_cache_hit_share"] > 0
    assert not any((bench.folder / "run" / "rollout_weights").iterdir())


def test_a_server_that_does_not_answer_is_named(bench: Bench, tmp_path: Path):
    from appo.training.vllm_server import ServedEngine, ServerError

    recipe = bench.recipe("training.rollout=vllm_server", "training.vllm_server_url=http://127.0.0.1:9")
    with pytest.raises(ServerError, match="vllm_server_url=http://127"):
        ServedEngine(recipe, tmp_path, accelerator=None, timeout_s=0.0)
