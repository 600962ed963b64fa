"""The frame probe against eager attention, and packed scoring against plain, with this device's attention kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from appo.perception.probe import attention_to_frames
from benchmarks.arms import Step
from benchmarks.gpu_check.rows import Row
from benchmarks.shapes import SHAPES, Shape, build_model, build_prompts, completions, resized

# Query heads, key-value heads, width of a head, completion tokens, keys: Qwen2.5-VL-3B at the paper's longest prompts.
PROBE = {"cuda": (16, 2, 128, 512, 4096), "cpu": (16, 2, 128, 64, 1024)}
FRAMES, CHUNK_MIB = 15, 64
# Keys and queries in bfloat16 are exact in float32; only sums of some hundred terms round.
EXACT = 1e-5
# Of bfloat16: mean distance between kernels that round at other places, and the probe's relative distance.
LOGPS, ATTENTION = 0.03, 0.02


def probe_rows(device: str) -> Iterator[Row]:
    """The arithmetic alone, then within a model's pass."""
    heads, key_heads, width, length, keys = PROBE[device]
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, heads, length, width, generator=generator).to(device, torch.bfloat16)
    cache = torch.randn(1, key_heads, keys, width, generator=generator).to(device, torch.bfloat16)
    visible = torch.ones(length, keys, dtype=torch.bool, device=device).tril(keys - length)
    frame_of_key = (torch.arange(keys, device=device) * FRAMES // keys).expand(1, -1)
    made = (queries, cache, visible, frame_of_key, FRAMES)
    scaling = width**-0.5
    expected = _slow(*made, scaling)
    row = Row("probe: against eager attention in float64")
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.autocast(device, torch.bfloat16):
        found = attention_to_frames(*made, scaling=scaling, chunk_bytes=CHUNK_MIB << 20)
    if device == "cuda":
        held = (torch.cuda.max_memory_allocated() - before) / 2**20
        row.bounded("MiB held", held, most=1.25 * CHUNK_MIB)
    row.bounded("worst relative distance", _worst(found, expected), most=EXACT)
    yield row

    step = _step(device)
    rows = step._rows("plain_dapo", 0)
    lengths = torch.tensor([len(one.tokens) for one in rows])
    with torch.no_grad(), step._autocast():
        _, attention, _ = step._eager(rows, int(lengths.max()), lengths.to(device))
        scores = step._score("probe_appo", rows, int(lengths.max()), probe=True)
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    row = Row("probe: in a pass, against transformers' eager matrices")
    row.bounded("worst relative distance", _worst(scores.attention[valid], attention[valid]), most=ATTENTION)
    yield row


def packed_rows(device: str) -> Iterator[Row]:
    """A group on one copy of its prompt against every completion with a prompt of its own."""
    step = _step(device)
    for name, checked in (("bfloat16", LOGPS), ("float32", EXACT)):
        found: dict[str, Any] = {}
        for arm in ("plain_dapo", "dapo"):
            rows = step._rows(arm, 0)
            longest = max(len(one.tokens) for one in rows)
            with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
                found[arm] = step._score(arm, rows, longest, probe=False).logps
        row = Row(f"packed against plain scoring, {name}")
        distance = (found["dapo"] - found["plain_dapo"]).abs().mean()
        # The tower's features are bfloat16 in both, and the same.
        row.bounded("log-probabilities off by", float(distance), most=checked)
        yield row


def _step(device: str) -> Step:
    shape = _shape(device)
    model = build_model(shape, torch.device(device))
    return Step(shape, model, build_prompts(shape, model), completions(shape))


def _shape(device: str) -> Shape:
    if device == "cuda":  # whole widths, so that the kernels are those of a training
        return resized(SHAPES["3b"], layers=4, completion=128)
    return resized(SHAPES["tiny"], dtype="bfloat16")


def _slow(
    queries: Any, keys: Any, visible: Any, frame_of_key: Any, num_frames: int, scaling: float
) -> torch.Tensor:
    repeated = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    weights = (queries.double() @ repeated.transpose(-1, -2) * scaling).masked_fill(~visible, float("-inf"))
    members = torch.nn.functional.one_hot(frame_of_key[0], num_frames).double()
    return weights.softmax(-1).mean(1) @ (members / members.sum(0))


def _worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
