"""The arms that are timed against one another compute the same, with torch, transformers and trl alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from appo.training.scoring import log_normalizers
from benchmarks.arms import Step, gradient
from benchmarks.counting import architecture, count, lengths, token_weights
from benchmarks.gpu_check.bounds import relative
from benchmarks.shapes import SHAPES, build_model, build_prompts, completions, sharpened
from tests.tiers import long

# Float32 sums in another order, through four layers and the head.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def step():
    shape = replace(SHAPES["tiny"], groups=2)
    model = sharpened(build_model(shape, torch.device("cpu")))
    return Step(shape, model, build_prompts(shape, model), completions(shape))


def test_all_arms_score_alike(step):
    lengths = torch.tensor([len(c) for c in step.completions[0]])
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    with torch.no_grad():
        plain = step._score("probe_appo", step._rows("probe_appo", 0), int(lengths.max()), probe=True)
        shared = step._score("appo", step._rows("appo", 0), int(lengths.max()), probe=True)
        logits, attention, logps = step._eager(step._rows("plain_appo", 0), int(lengths.max()), lengths)
    torch.testing.assert_close(shared.logps[valid], plain.logps[valid], **CLOSE)
    torch.testing.assert_close(logps[valid], plain.logps[valid], **CLOSE)
    torch.testing.assert_close(shared.attention[valid], attention[valid], **CLOSE)
    torch.testing.assert_close(plain.attention[valid], attention[valid], **CLOSE)
    assert attention[valid].std() > 1e-4  # not uniform: the comparison says something
    head = step.model.get_output_embeddings().weight
    torch.testing.assert_close((shared.hidden @ head.T)[valid], logits[valid], **CLOSE)


def test_the_normalizer_of_a_known_token_is_the_sum_over_the_vocabulary(step):
    rows = step._rows("appo", 0)
    with torch.no_grad():
        scores = step._score("appo", rows, max(len(row.tokens) for row in rows), probe=True)
    head = step.model.get_output_embeddings().weight.detach()
    for place, row in enumerate(rows):
        here = scores.hidden[place, : len(row.tokens)]
        found = log_normalizers(
            here, row.tokens, scores.logps[place, : len(row.tokens)], head, temperature=1.0
        )
        torch.testing.assert_close(found, (here @ head.T).logsumexp(dim=-1), **CLOSE)
    # Rounded logits have another sum.
    assert log_normalizers(here.bfloat16(), row.tokens, scores.logps[place], head, temperature=1.0) is None


@pytest.mark.parametrize("scoring", [True, False])
def test_both_ways_to_run_a_step_give_one_gradient(step, scoring):
    assert relative(gradient(step, "plain_dapo", scoring), gradient(step, "dapo", scoring)) < 1e-3
    assert relative(gradient(step, "probe_appo", scoring), gradient(step, "appo", scoring)) < 1e-3
    assert relative(gradient(step, "dapo", scoring), gradient(step, "appo", scoring)) > 1e-2


@pytest.mark.parametrize("arm", ["probe_appo", "appo"])
def test_reading_attention_in_the_update_survives_gradient_checkpointing(step, arm):
    expected = gradient(step, arm, False)
    step.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        assert relative(expected, gradient(step, arm, False)) < 1e-5
    finally:
        step.model.gradient_checkpointing_disable()


def test_every_arm_runs_with_rollouts_and_names_its_phases(step):
    step.phases.take()
    for arm, phases in {
        "plain_dapo": {"rollout", "scoring", "update", "optimizer"},
        "plain_appo": {"rollout", "scoring", "attention", "weights", "update", "optimizer"},
        "appo": {"rollout", "scoring", "attention", "weights", "update", "optimizer"},
    }.items():
        step.run(arm, rollout=True)
        assert set(step.phases.take()) == phases


def test_counts_agree_with_the_models_weights():
    for name in ("tiny", "cpu"):
        model = build_model(SHAPES[name], torch.device("meta"))
        sizes = architecture(SHAPES[name]).parameters
        assert sum(p.numel() for p in model.parameters()) == sizes.total - sizes.tower * (
            "visual" not in model.model._modules  # a frozen tower may stand beside the model
        )
        tower = model.model.visual
        assert sum(p.numel() for p in tower.parameters()) == sizes.tower
    # Ours does less in every shape, and plain does at most G times as much.
    for shape in SHAPES.values():
        ratio = count(shape, shared=False).both / count(shape, shared=True).both
        assert 1.5 < ratio < 2 * shape.generations


@pytest.mark.parametrize("name", ["3b", "7b"])
def test_token_weights_count_little_beside_a_step(name):
    """As docs/benchmarks.md says: under two hundredths where three frames choose 64 tokens each of every completion."""
    shape = SHAPES[name]
    step = count(shape, shared=True).both
    assert token_weights(shape, 3 * 64 * shape.generations) / step < 0.02
    assert 0.02 < token_weights(shape, sum(lengths(shape))) / step < 0.031  # every token, the worst there is


LOADED = """
import sys, torch, transformers, trl, trl.trainer.utils
before = set(sys.modules)
import benchmarks.training_step, benchmarks.growth_figure, appo.modeling.feature_cache
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


@long
def test_what_is_measured_needs_torch_transformers_and_trl_alone():
    """So that a GPU machine needs no more than these, with what they bring along."""
    found = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {
        "pydantic",
        "yaml",
        "typer",
        "rich",
        "decord",
        "av",
        "boto3",
        "mlflow",
        "kfp",
        "vllm",
        "matplotlib",
    }
    assert "benchmarks" in found
    assert not ours & set(found)
