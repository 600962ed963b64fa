"""Time and extra memory of APPO's token weights at full size: `python -m benchmarks.weights`.

Needs torch alone, and takes a CUDA device where there is one. Two groups of eight completions with a head of
151,936 x 2,048 (Qwen2.5-VL-3B): the worst, in which ten frames choose every token, and one as training meets
it. On CUDA every chunk size is timed; on a CPU only the default, once, as its products alone take half a
minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from appo.perception import perception_weights_from_hidden

COMPLETIONS, TOKENS, PATCHES, VOCABULARY, HIDDEN = 8, 512, 15, 151_936, 2048
CASES = {"worst: 10 frames, all tokens": (10, 512), "usual: 4 frames, 250 tokens": (4, 250)}


def group(num_frames: int, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention, lengths and rewards such that each of `num_frames` frames is looked at by other tokens."""
    attention = torch.rand(COMPLETIONS, TOKENS, PATCHES) * 1e-3
    for frame in range(num_frames):
        attention[:, (torch.arange(64) + 51 * frame) % length, frame] += 1
    lengths = torch.full((COMPLETIONS,), length)
    return attention.to(device), lengths.to(device), torch.ones(COMPLETIONS, device=device)


def peak_mb(call: Callable[[], object], device: str) -> float:
    """Most megabytes that tensors made by `call` held at one time."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(changes, initial=0)) / 1e6


def seconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + (device == "cuda")):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[device == "cuda" :])[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="smaller for a quick look")
    arguments = parser.parse_args()
    device = arguments.device
    where = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    print(json.dumps({"device": where, "threads": torch.get_num_threads(), "torch": torch.__version__}))
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    for dtype in dtypes:
        hidden = torch.randn(COMPLETIONS, TOKENS, HIDDEN, device=device, dtype=dtype)
        head = torch.randn(arguments.vocabulary, HIDDEN, device=device, dtype=dtype) / 50
        for name, (num_frames, length) in CASES.items():
            inputs = group(num_frames, length, device)
            for chunk_mib in (24, 128, 512) if device == "cuda" else (24,):

                def call() -> object:
                    return perception_weights_from_hidden(
                        *inputs,  # noqa: B023  called before the loop goes on
                        hidden,  # noqa: B023
                        head,  # noqa: B023
                        k1=15,
                        k2=num_frames,  # noqa: B023
                        k3=64,
                        max_weight=1.7,
                        chunk_mib=chunk_mib,  # noqa: B023
                    )

                row = {
                    "case": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "chunk_mib": chunk_mib,
                    "seconds": round(seconds(call, device, 5 if device == "cuda" else 1), 4),
                    "extra_mb": round(peak_mb(call, device), 1),
                }
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
