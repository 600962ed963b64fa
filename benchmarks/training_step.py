"""How long a training step takes and what it holds, plain and ours, interleaved: `python -m
benchmarks.training_step`.

Needs torch, transformers and trl alone. On a CPU it runs the largest shape that fits a few minutes on two
cores; on a GPU `--shape 3b` and `--shape 7b` are the paper's settings with random weights. One round runs
every arm once, in turn, so that whatever else the machine does meets all of them; figures are medians over
rounds, ratios are medians of the ratios within a round. `--grow` repeats scoring and update while frames,
completions and group grow.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import ARMS, Step
from benchmarks.counting import count
from benchmarks.shapes import SHAPES, Shape, build_model, build_prompts, completions, resized

PHASES = ("rollout", "scoring", "attention", "weights", "update", "optimizer")
# Everything that training does with finished rollouts.
TRAINING = ("scoring", "attention", "weights", "update", "optimizer")
SHARED = ("dapo", "appo")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.shape or ("3b" if device.type == "cuda" else "cpu")
    shape = resized(
        SHAPES[name],
        frames=args.frames,
        completion=args.completion,
        generations=args.generations,
        groups=args.groups,
        layers=args.layers,
        lora=args.lora,
        dtype=args.dtype,
        checkpointing=args.checkpointing,
    )
    model = build_model(shape, device)
    found: dict[str, Any] = {"machine": machine(device), "shape": asdict(shape)}
    print(f"{shape.name}: {found['machine']}", flush=True)
    if args.grow:
        found["growth"] = grow(shape, model, args.grow, args.arms, args.rounds)
    else:
        found |= compare(shape, model, args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def compare(shape: Shape, model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """All arms in turn, `args.rounds` times after a round that is not counted; then memory, on its own."""
    step = Step(shape, model, build_prompts(shape, model), completions(shape))
    scoring = not args.on_policy
    rounds: list[dict[str, dict[str, float]]] = []
    peaks: dict[str, float] = {}
    began, longest = time.perf_counter(), 0.0
    for number in range(args.rounds + 1):
        started = time.perf_counter()
        if number > 1 and started - began + longest > args.budget_s:
            break
        timed: dict[str, dict[str, float]] = {}
        for arm in _rotated(args.arms, number):
            rollout = number >= 1 and number <= args.rollouts
            on_gpu = step.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
                standing = torch.cuda.memory_allocated()
            step.run(arm, rollout=rollout, scoring=scoring)
            # As on a CPU: of training, not of the rollouts' cache, above the model and the optimizer's state, which the
            # first step makes.
            if on_gpu and number and not rollout:
                held = (torch.cuda.max_memory_allocated() - standing) / 2**20
                peaks[arm] = max(peaks.get(arm, 0.0), held)
            timed[arm] = step.phases.take()
            print(f"round {number} {arm}: {_line(timed[arm])}", flush=True)
        longest = max(longest, time.perf_counter() - started)
        if number:
            rounds.append(timed)
    if step.device.type == "cpu" and not args.no_memory:
        for arm in args.arms:
            peaks[arm] = _cpu_peak_mib(lambda arm=arm: step.run(arm, rollout=False, scoring=scoring))
    result = {
        "on_policy": args.on_policy,
        "rounds": rounds,
        "peak_mib": peaks,
        "counted": _counted(shape, args.arms),
    }
    print(table(result, args.arms), flush=True)
    return result


def table(result: dict[str, Any], arms: Sequence[str]) -> str:
    """Markdown: medians of the phases in seconds, ratios to the first arm, peak memory."""
    rounds, first = result["rounds"], arms[0]
    lines = [
        f"| arm | {' | '.join(PHASES)} | training | speed-up | counted | whole step | speed-up | MiB |",
        "|---" * (len(PHASES) + 7) + "|",
    ]
    for arm in arms:
        phases = [_median(r[arm].get(p) for r in rounds) for p in PHASES]
        whole = [r for r in rounds if "rollout" in r[arm]]
        cells = [
            *map(_seconds, phases),
            _seconds(_median(_sum(r[arm], TRAINING) for r in rounds)),
            _ratio(rounds, first, arm, TRAINING),
            f"{result['counted'][first] / result['counted'][arm]:.2f}",
            _seconds(_median(_sum(r[arm], PHASES) for r in whole)),
            _ratio(whole, first, arm, PHASES),
            f"{result['peak_mib'].get(arm, float('nan')):,.0f}",
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for name, base in (("appo", "dapo"), ("probe_appo", "plain_dapo"), ("plain_appo", "plain_dapo")):
        if name in arms and base in arms:
            rolled = [r for r in rounds if "rollout" in r[name]]
            lines.append(
                f"\nsamples per second of {name} over {base}: {_ratio(rounds, base, name, TRAINING)} "
                f"(scoring + update), {_ratio(rolled, base, name, PHASES)} "
                "(whole step)"
            )
    return "\n".join(lines)


def grow(shape: Shape, model: Any, what: str, arms: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Scoring and update at growing frames, completions or groups; counts beside them."""
    factors = {"frames": (1, 2, 4, 8), "completion": (1, 2, 4), "generations": (4, 8, 16, 32)}
    found = []
    for size in factors[what] if what == "generations" else [getattr(shape, what) * f for f in factors[what]]:
        sized = resized(shape, **{what: size})
        step = Step(sized, model, build_prompts(sized, model), completions(sized))
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(rounds + 1):
            for arm in arms:
                step.run(arm, rollout=False)
                seconds = _sum(step.phases.take(), TRAINING)
                if number or not rounds:
                    times[arm].append(seconds)
        entry = {
            "what": what,
            "size": size,
            "seconds": {arm: statistics.median(values) for arm, values in times.items()},
            "counted": _counted(sized, arms),
        }
        print(json.dumps(entry), flush=True)
        found.append(entry)
    return found


def machine(device: torch.device) -> dict[str, str]:
    import transformers
    import trl

    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}"
    )
    return {
        "device": name,
        "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _rotated(arms: Sequence[str], number: int) -> list[str]:
    """Another arm begins each round: what runs after a large one finds other caches than what runs after a small."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def _counted(shape: Shape, arms: Sequence[str]) -> dict[str, float]:
    return {arm: shape.groups * count(shape, shared=arm in SHARED).both for arm in arms}


def _cpu_peak_mib(call: Callable[[], object]) -> float:
    """Most MiB that tensors made by `call` held at one time, above the model and the optimizer's state."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(accumulate(changes, initial=0)) / 2**20


def _sum(phases: dict[str, float], names: Sequence[str]) -> float:
    return sum(phases.get(name, 0.0) for name in names)


def _median(values: Any) -> float | None:
    kept = [value for value in values if value is not None]
    return statistics.median(kept) if kept else None


def _ratio(rounds: list[dict[str, Any]], base: str, arm: str, names: Sequence[str]) -> str:
    ratios = [_sum(r[base], names) / _sum(r[arm], names) for r in rounds]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {phases[name]:.3f} s" for name in PHASES if name in phases)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_step", description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="default: 3b on a GPU, cpu without one")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds, after one that is not")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start no round that would pass it")
    parser.add_argument("--rollouts", type=int, default=1, help="in how many rounds to generate, too")
    parser.add_argument("--on-policy", action="store_true", help="no scoring pass before the update")
    parser.add_argument("--grow", choices=("frames", "completion", "generations"))
    for size in ("frames", "completion", "generations", "groups", "layers"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help="default: the shape's")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters alone")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the shape's")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory pass on a CPU")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
