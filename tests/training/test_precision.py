"""What is trained is float32, what leaves a training is `model.dtype`, rounded once; nothing drifts on the way."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from appo.training import layouts
from tests.training.conftest import Bench

pytestmark = pytest.mark.slow

HALF = ("model.dtype=bfloat16", "training.max_steps=1", "training.save_every=1")


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list:
    """Trainers as they were made."""
    from appo.training.trainer import VideoGRPOTrainer

    made: list = []
    init = VideoGRPOTrainer.__init__

    def keeping(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(VideoGRPOTrainer, "__init__", keeping)
    return made


def test_a_published_checkpoint_is_the_masters_rounded_once(bench: Bench, kept: list):
    bench.train("appo", *HALF)
    masters = dict(kept[0]._policy().named_parameters())
    folder = bench.folder / "run" / "checkpoint"
    published = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in published.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"

    from transformers import AutoModelForImageTextToText

    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert loaded.dtype == torch.bfloat16
    weights = dict(loaded.named_parameters())
    for name, master in masters.items():
        assert master.dtype == torch.float32, name
        assert torch.equal(weights.pop(name), master.bfloat16()), name
    # What is left is the frozen tower: as it came, in the same type.
    source = AutoModelForImageTextToText.from_pretrained(bench.model, dtype=torch.bfloat16)
    tower = dict(source.named_parameters())
    assert weights
    for name, weight in weights.items():
        assert name.startswith("model.visual."), name
        assert torch.equal(weight, tower[name]), name


def test_masters_and_moments_live_in_resumable_checkpoints_alone(bench: Bench, kept: list):
    bench.train("appo", *HALF)
    resumable = bench.folder / "run" / "checkpoints" / "checkpoint-1"
    assert not list(resumable.rglob("*.safetensors"))
    trained = sum(p.numel() for p in kept[0]._policy().parameters() if p.requires_grad)
    held = sum(file.stat().st_size for file in (resumable / "state").iterdir())
    assert 12 * trained <= held < 13 * trained  # three float32 numbers each, and their names
    whole = sum(file.stat().st_size for file in (bench.folder / "run" / "checkpoint").glob("*.safetensors"))
    everything = trained + sum(p.numel() for p in kept[0]._policy().model.visual.parameters())
    assert 2 * everything <= whole < 2.2 * everything


def test_adapters_are_merged_without_touching_what_they_change(bench: Bench, kept: list):
    """Merged in place and taken out again, a bfloat16 weight would come back another one."""
    bench.train("appo", *HALF, "model.lora={rank: 4}", "training.learning_rate=0.05")
    policy = kept[0]._policy()
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    handed = dict(layouts.published_weights(policy, torch.bfloat16))
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not any("lora" in name or "base_layer" in name for name in handed)
    changed = 0
    for name, layer in policy.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base, up, down = (
            x.weight.double() for x in (layer.base_layer, layer.lora_B.default, layer.lora_A.default)
        )
        expected = base + layer.scaling["default"] * up @ down
        found = handed[name.removeprefix("base_model.model.") + ".weight"]
        assert found.dtype == torch.bfloat16
        # One rounding, by half of bfloat16's spacing; the float32 sum before it cancels to 1e-6 in places.
        torch.testing.assert_close(found.double(), expected.detach(), rtol=2**-7.99, atol=1e-6)
        changed += int((found != layer.base_layer.weight).sum())
    assert changed > 0


def test_published_adapters_are_rounded_once(bench: Bench, kept: list):
    bench.train("appo", *HALF, "model.lora={rank: 4}")
    found = load_file(bench.folder / "run" / "checkpoint" / "adapter_model.safetensors")
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}
    for name, parameter in kept[0]._policy().named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32
            assert torch.equal(found[name.replace(".default.", ".")], parameter.bfloat16()), name


def test_the_reference_shares_the_tower_and_the_type(bench: Bench, kept: list):
    bench.train("grpo", *HALF)
    reference, policy = kept[0].ref_model, kept[0]._policy()
    assert {p.dtype for p in reference.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in reference.parameters())
    assert reference.model.visual is policy.model.visual
    # It is the start, not the policy: one step lies between them.
    assert bench.metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-3)


def test_a_tower_that_trains_has_masters_too(bench: Bench, kept: list):
    bench.train("dapo", *HALF, "model.freeze_vision=false")
    policy = kept[0]._policy()
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in policy.model.visual.parameters())
    published = load_file(bench.folder / "run" / "checkpoint" / "model.safetensors")
    assert {weight.dtype for weight in published.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("algorithm", "beta"), [("grpo", 0.01), ("dapo", 0.0), ("appo", 0.0)])
def test_the_kl_coefficient_reaches_the_loss(bench: Bench, kept: list, algorithm: str, beta: float):
    bench.train(algorithm, "training.max_steps=1")
    assert kept[0].beta == beta
    assert (kept[0].ref_model is not None) == (beta > 0)
    assert ("kl" in bench.metrics()[0]) == (beta > 0)
