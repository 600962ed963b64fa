"""`appo rehearse` on a model of the demo's size: what it runs, what it says, and what it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from appo import cli
from appo.config import load_recipe
from appo.rehearsal.smaller import rehearsed
from tests.tiers import long

pytestmark = pytest.mark.slow
SMALL = ("model.dtype=bfloat16", "model.warm_start=null", "video.num_frames=8", "perception.k2=2")


def recipe(model: Path) -> tuple[str, ...]:
    return (*SMALL, f"model.path={model}")


def rehearse(model: Path) -> dict:
    words = [word for value in recipe(model) for word in ("--set", value)]
    result = CliRunner().invoke(cli.app, ["rehearse", "demo", "--json", *words])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def check(found: dict) -> dict[str, dict]:
    assert {"recipe", "parameters", "layers", "phases", "peak_gib"} <= set(found)
    assert found["recipe"] == "demo"
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert all({"name", "seconds", "peak_gib", "planned_gib"} <= set(phase) for phase in phases.values())
    assert {"build", "rollout", "update", "weights", "look", "checkpoint", "publish"} <= set(phases)
    for name in ("rollout", "update", "look"):
        phase = phases[name]
        # A process holds programs beside its tensors, and never less than these.
        assert 0 < phase["planned_gib"] <= phase["peak_gib"] <= found["peak_gib"] + 0.1
    return phases


@long
def test_a_rehearsal_trains_saves_and_says_what_it_took(
    small_set: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from appo.modeling.architecture import architecture_of

    monkeypatch.setattr("appo.rehearsal.run.STAGES", ("build", "train"))
    _, model = small_set
    found = rehearse(model)
    check(found)
    architecture = architecture_of(str(model))
    assert found["layers"] == architecture.text.layers
    # The rehearsal's vocabulary is padded to the model's own, so that the count is the published one.
    assert found["parameters"] == architecture.parameters.total


@long
def test_a_whole_rehearsal_serves_and_evaluates_too(small_set: tuple[Path, Path]) -> None:
    phases = check(rehearse(small_set[1]))
    for name in ("rollout_vllm", "reload", "evaluate"):
        assert phases[name]["seconds"] > 0


def test_what_cannot_be_rehearsed_is_refused_by_name() -> None:
    runner = CliRunner()
    unknown = runner.invoke(cli.app, ["rehearse", "demo", "--set", "model.path=Qwen/Nobody"])
    assert unknown.exit_code == 2
    assert "model.path='Qwen/Nobody'" in unknown.output
    made = runner.invoke(cli.app, ["rehearse", "demo"])
    assert made.exit_code == 2, made.output
    too_deep = runner.invoke(cli.app, ["rehearse", "qwen2.5_vl_3b_video_r1_34k", "--layers", "99"])
    assert too_deep.exit_code == 2, too_deep.output
    assert "--layers 99" in too_deep.output


def test_the_rehearsed_recipe_keeps_what_decides_about_memory() -> None:
    shipped = load_recipe("qwen2.5_vl_3b_video_r1_34k")
    small = rehearsed(shipped, Path("/model"))
    assert small.video == shipped.video
    assert small.data.template == shipped.data.template
    assert small.training.shared_prefix == shipped.training.shared_prefix
    assert small.training.gradient_checkpointing == shipped.training.gradient_checkpointing
    assert small.model.lora is not None
    assert small.model.dtype == "bfloat16"
