"""A step's record of how near the device came to its peak: what the trainer counts against what torch counts of it."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from appo.modeling import devices
from appo.training import phases as phases_module
from appo.training.work import PHASES, Work, step_metrics


@pytest.fixture
def counted(monkeypatch):
    """phase -> what torch counts in it, by step, inner phases taken out of outer ones as seconds are."""
    found = defaultdict(list)
    original = phases_module.Phases.__call__
    inner = []

    @contextmanager
    def call(self, name):
        inner.append(0)
        with original(self, name), FlopCounterMode(display=False) as counter:
            yield
        total = counter.get_total_flops()
        found[name].append(total - inner.pop())
        if inner:
            inner[-1] += total

    monkeypatch.setattr(phases_module.Phases, "__call__", call)
    with sdpa_kernel(SDPBackend.MATH):  # torch counts nothing of the fused one on a CPU
        yield found


def test_a_step_counts_what_torch_counts(bench, counted):
    bench.train("appo", "training.max_steps=2", "policy.num_generations=4")
    first, second = bench.metrics()
    # The first step's rollouts are checked against scoring with a few more.
    assert second["tflop/rollout"] * 1e12 == pytest.approx(counted["rollout"][1], rel=0.02)
    weights = sum(counted["weights"][len(counted["weights"]) // 2 :])
    assert second["tflop/weights"] * 1e12 == pytest.approx(weights, rel=0.02)
    # Torch counts the head's logits once more and the in-place products of its gradients not at all, and a few small
    # products beside weights and attention, of rotary positions and divergences.
    update = sum(counted["update"][len(counted["update"]) // 2 :])
    assert second["tflop/update"] * 1e12 == pytest.approx(update, rel=0.04)
    assert set(first) == set(second)


def test_every_phase_says_how_fast_it_was(bench):
    bench.train("appo", "training.max_steps=2", "training.shared_prefix=false")
    for line in bench.metrics():
        assert 0 < line["mfu"] < 1
        counted = [name for name in PHASES if f"tflop/{name}" in line]
        assert set(counted) == {"rollout", "weights", "update"}
        total = sum(line[f"tflop/{name}"] for name in counted)
        assert line["mfu"] == pytest.approx(total / line["step_s"] / line["device_peak_tflops"])
        assert total == pytest.approx(sum(v for k, v in line.items() if k.startswith("tflop_of/")))
        assert {"tflop_of/attention", "tflop_of/weights", "tflop_of/probe"} <= set(line)
        assert line["tokens_per_second_per_device"] == pytest.approx(line["tokens_per_second"])
        for name in counted:
            seconds = line[f"phase/{name}_s"]
            assert line[f"mfu/{name}"] == pytest.approx(
                line[f"tflop/{name}"] / seconds / line["device_peak_tflops"]
            )
            assert line[f"samples_per_second/{name}"] == pytest.approx(4 / seconds)
            tokens = line["tokens_per_second"] * line["step_s"]
            assert line[f"tokens_per_second_per_device/{name}"] == pytest.approx(tokens / seconds)


def test_adapters_and_a_reference_count_what_they_run(bench):
    bench.train("grpo", "training.max_steps=1", "model.lora.rank=4", name="lora")
    bench.train("grpo", "training.max_steps=1", name="full")
    adapted, full = bench.metrics("lora")[0], bench.metrics("full")[0]
    assert "tflop/scoring" in adapted  # the reference is the model with its adapters off
    assert adapted["tflop/scoring"] == pytest.approx(full["tflop/scoring"], rel=0.2)
    assert 0.6 < adapted["tflop/update"] / full["tflop/update"] < 0.75


def prompt(tokens, frames=4):
    grid = torch.tensor([[frames, 16, 16]])
    video = SimpleNamespace(features=torch.zeros(1), grid_thw=grid)
    return SimpleNamespace(ids=torch.zeros(tokens), num_frames=frames, video=video, image=None)


@pytest.fixture(scope="module")
def work():
    from appo.config import load_recipe
    from appo.modeling.architecture import architecture_of, transformers_config

    config = transformers_config(architecture_of("Qwen/Qwen2.5-VL-7B-Instruct"))
    return Work(config, load_recipe("demo", ["model.dtype=bfloat16"]))


def test_counting_a_step_costs_less_than_a_millisecond(work):
    prompts, groups, lengths = [prompt(614)] * 128, [i // 8 for i in range(128)], [300] * 128
    times = []
    for _ in range(20):
        began = time.perf_counter()
        work.drew(prompts, groups, lengths)
        work.passed("update", prompts, groups, lengths, 512, layers_read=3)
        work.weighed(9000, normalizers_known=False)
        work.take({"rollout": 1.0, "update": 1.0, "weights": 0.1})
        times.append(time.perf_counter() - began)
    assert min(times) < 1e-3


def test_pixels_count_the_tower_in_every_pass(work):
    with_features = prompt(614)
    pixels = prompt(614)
    pixels.video.features = None
    for given in (with_features, pixels):
        work.passed("scoring", [given] * 4, [0] * 4, [9] * 4, 9, layers_read=0)
    found = work.take({"scoring": 1.0})
    tower = found["tflop_of/tower"]
    assert tower > 0
    work.passed("scoring", [pixels] * 4, [0] * 4, [9] * 4, 9, layers_read=0)
    assert work.take({})["tflop_of/tower"] == tower  # once for a group
    assert work.take({}) == {}


def test_a_servers_rollouts_are_not_this_devices(bench):
    recipe = bench.recipe("training.rollout=vllm_server", "training.vllm_server_url=http://x:1")
    from appo.modeling.loading import load_policy

    work = Work(load_policy(str(bench.model), recipe.model).config, recipe)
    work.drew([prompt(50)] * 4, [0] * 4, [3] * 4)
    assert work.take({"rollout": 1.0}) == {}


def test_figures_of_a_step_by_hand():
    logged = {"phase/update_s": 2.0, "phase/rewards_s": 1.0, "tflop/update": 8.0, "device_peak_tflops": 4.0}
    found = step_metrics(logged, prompts=16, tokens=1000.0, processes=5, step_s=4.0)
    assert found == {
        "samples_per_second/update": 8.0,
        "tokens_per_second_per_device/update": 100.0,
        "tokens_per_second_per_device": 50.0,
        "mfu": 0.5,
    }


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_known_devices_have_their_published_peak(name, peak):
    assert devices.known(name).peak("bfloat16") == peak


def test_an_unknown_device_is_measured():
    assert devices.known("Graphcore IPU") is None
    peak, source = devices.peak_here("float32")
    if not torch.cuda.is_available():
        assert source == "measured on this CPU"
        assert 1e9 < peak < 1e13
    state = torch.random.get_rng_state()
    devices.peak_here("bfloat16")
    assert torch.equal(state, torch.random.get_rng_state())
