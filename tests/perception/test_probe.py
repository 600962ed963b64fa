"""The probe's own arithmetic: equal to a slow reference, float32 whatever runs around it, within its memory."""

from __future__ import annotations

import pytest
import torch

from appo.perception.probe import attention_to_frames
from tests.perception.memory import peak_extra_bytes

# (query heads, key-value heads, head width) of Qwen2.5-VL 3B and 7B.
SHAPES = {"3b": (16, 2, 128), "7b": (28, 4, 128)}


def case(rows: int, heads: int, kv_heads: int, length: int, keys: int, width: int, frames: int, dtype):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(rows, heads, length, width, generator=generator).to(dtype)
    cache = torch.randn(rows, kv_heads, keys, width, generator=generator).to(dtype)
    visible = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    frame_of_key = (torch.arange(keys) * (frames + 2) // keys - 1).clamp(max=frames - 1).expand(rows, -1)
    return queries, cache, visible, frame_of_key


def slow(queries, keys, visible, frame_of_key, num_frames, scaling):
    """Head by head, frame by frame, in float64."""
    repeated = keys.double().repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries.double() @ repeated.transpose(-1, -2) * scaling
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).mean(1)
    found = torch.zeros(*weights.shape[:2], num_frames, dtype=torch.float64)
    for row in range(len(weights)):
        for frame in range(num_frames):
            members = frame_of_key[row] == frame
            if members.any():
                found[row, :, frame] = weights[row][:, members].mean(-1)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [1, 50_000, 1 << 30])
def test_probe_equals_a_slow_reference_and_knows_no_autocast(dtype, chunk_bytes):
    made = case(3, 8, 2, 11, 40, 16, 5, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_to_frames(*made, 5, scaling=0.25, chunk_bytes=chunk_bytes)
    assert found.dtype == torch.float32
    # bfloat16 queries and keys are exact in float32; only sums of 16 and 40 terms round.
    torch.testing.assert_close(found.double(), slow(*made, 5, 0.25), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_probe_keeps_to_its_budget(shape, dtype, rows):
    """L = 4,096 keys, N = 512 completion tokens, as in the paper's longest prompts."""
    heads, kv_heads, width = SHAPES[shape]
    length = 512 if rows == 1 else 32  # more rows, the same work: what is bounded is one chunk
    made = case(rows, heads, kv_heads, length, 4096, width, 15, dtype)
    budget = 64 << 20
    peak = peak_extra_bytes(lambda: attention_to_frames(*made, 15, scaling=0.1, chunk_bytes=budget))
    assert peak <= 1.25 * budget, f"{peak / 2**20:.0f} MiB held where 64 were asked for"
