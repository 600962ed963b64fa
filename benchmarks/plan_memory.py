"""What `appo plan` predicts a GPU will hold, against what real trainings hold: `python -m benchmarks.plan_memory`.

Each configuration is a process of its own that trains two steps of the demo's recipe with the trainer as it is, and
looks at groups as a training does at its end. Measured are the bytes of all tensors: those that are alive when the
second step begins, and from then on every allocation and release of torch's allocator: on a CPU torch's profiler sees
them, on a GPU (`--gpu`) `torch.cuda.max_memory_allocated` counts them, without cuBLAS's workspaces. Predicted are the
plan's moments for the same recipe with that device's kernels. End tokens are ruled out, so that completions are as long
as the plan takes them to be.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

MIB = 2**20
SHAPES = {
    "tiny": {},
    "27M": {
        "hidden": 512,
        "layers": 8,
        "heads": 8,
        "key_value_heads": 2,
        "feed_forward": 1664,
        "vision_hidden": 128,
        "vision_layers": 4,
        "vision_heads": 4,
        "vision_feed_forward": 256,
    },
    "300M": {
        "hidden": 1024,
        "layers": 24,
        "heads": 16,
        "key_value_heads": 2,
        "feed_forward": 3328,
        "vision_hidden": 128,
        "vision_layers": 4,
        "vision_heads": 4,
        "vision_feed_forward": 256,
    },
}


@dataclass(frozen=True, slots=True)
class Case:
    """One row. lora: rank, 0 for full fine-tuning. size: pixels of a frame's side."""

    model: str
    dtype: str
    lora: int
    checkpointing: bool
    generations: int
    algorithm: str = "dapo"
    shared_prefix: bool = True
    accumulation: int = 1
    prompts: int = 4
    size: int = 56

    def __str__(self) -> str:
        parts = (
            self.model,
            self.dtype,
            f"LoRA {self.lora}" if self.lora else "all",
            "checkpointing" if self.checkpointing else "no checkpointing",
            f"G = {self.generations}",
            self.algorithm,
            "shared" if self.shared_prefix else "plain",
        )
        return ", ".join(parts)

    @property
    def overrides(self) -> list[str]:
        return [
            f"model.dtype={self.dtype}",
            *([f"model.lora.rank={self.lora}"] if self.lora else []),
            f"training.gradient_checkpointing={str(self.checkpointing).lower()}",
            f"training.shared_prefix={str(self.shared_prefix).lower()}",
            f"training.prompts_per_step={self.prompts}",
            f"training.gradient_accumulation_steps={self.accumulation}",
            f"policy.num_generations={self.generations}",
            f"algorithms=[{self.algorithm}]",
            f"data.key_moment.size={self.size}",
            f"video.max_pixels={self.size**2}",
            "data.key_moment.train=32",
            "data.key_moment.validation=16",
            "data.key_moment.test=2",
            "data.key_moment.easy_train=4",
            "policy.reward_weights={accuracy: 1.0}",
            "training.max_steps=2",
        ]


CASES = [
    Case("tiny", "float32", 0, False, 8, size=28),
    Case("tiny", "float32", 0, True, 4, prompts=16, size=28),
    Case("tiny", "bfloat16", 0, True, 8, algorithm="appo"),
    Case("tiny", "bfloat16", 8, False, 4, algorithm="grpo"),
    Case("27M", "float32", 0, False, 8),
    Case("27M", "float32", 0, True, 8, accumulation=2),
    Case("27M", "float32", 8, False, 4),
    Case("27M", "float32", 0, False, 4, shared_prefix=False),
    Case("27M", "bfloat16", 0, False, 8),
    Case("27M", "bfloat16", 0, True, 4, algorithm="appo"),
    Case("27M", "bfloat16", 0, True, 8, algorithm="grpo"),
    Case("27M", "bfloat16", 8, False, 8, algorithm="appo"),
    Case("27M", "bfloat16", 8, True, 4),
    Case("27M", "bfloat16", 8, True, 8, shared_prefix=False),
]

# As large as a GPU finds worth its while, in the type that it is for.
GPU_CASES = [
    Case("27M", "bfloat16", 0, True, 8, algorithm="appo", prompts=16, size=112),
    Case("27M", "bfloat16", 0, False, 8, prompts=16, size=112),
    Case("27M", "bfloat16", 8, True, 8, shared_prefix=False, prompts=16, size=112),
    Case("300M", "bfloat16", 0, True, 8, algorithm="grpo"),
    Case("300M", "bfloat16", 16, False, 8, algorithm="appo"),
]
ALLOWED = 0.1  # relative distance of what is predicted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("--only", type=int, nargs="+", help="rows, counted from 0")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--gpu", action="store_true", help="on this machine's GPU")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = GPU_CASES if args.gpu else CASES
    if args.one is not None:
        print(json.dumps(run(cases[args.one], gpu=args.gpu)))
        return 0
    found = []
    for number in args.only or range(len(cases)):
        command = [sys.executable, "-m", "benchmarks.plan_memory", "--one", str(number)]
        command += ["--gpu"] if args.gpu else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(_row(found[-1]) if len(found) > 1 else "\n".join([*HEADER, _row(found[-1])]), flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if all(abs(found_ratio(entry, "step") - 1) <= ALLOWED for entry in found) else 1


HEADER = (
    "| model | dtype | trains | checkpointing | G | algorithm | prefix | accumulation | step: MiB predicted | measured "
    "| ratio | look: MiB predicted | measured | ratio |",
    "|---" * 14 + "|",
)


def found_ratio(entry: dict[str, Any], what: str) -> float:
    return float(entry["predicted"][what] / entry["measured"][what])


def _row(entry: dict[str, Any]) -> str:
    case = Case(**entry["case"])
    cells = [
        case.model,
        case.dtype,
        f"LoRA {case.lora}" if case.lora else "all",
        "yes" if case.checkpointing else "no",
        case.generations,
        case.algorithm,
        "shared" if case.shared_prefix else "plain",
        case.accumulation,
    ]
    for what in ("step", "look"):
        cells += [f"{entry[side][what] / MIB:,.0f}" for side in ("predicted", "measured")]
        cells.append(f"{found_ratio(entry, what):.3f}")
    return f"| {' | '.join(map(str, cells))} |"


def run(case: Case, *, gpu: bool = False) -> dict[str, Any]:
    """Predicted and measured bytes of one case, in this process."""
    from appo.config import load_recipe
    from appo.modeling import cpu_bfloat16
    from appo.modeling.architecture import TinyShape
    from appo.planning.memory import moments
    from appo.planning.setting import on_cpu, settings_of
    from benchmarks.gpu_check import small_set

    cpu_bfloat16.needed = lambda: False  # its copies in float32 are no part of what a GPU holds
    watch = GpuWatch() if gpu else Watch()
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("demo", case.overrides)
        manifest, model = small_set.write(recipe, Path(folder), TinyShape(**SHAPES[case.model]))
        planned = load_recipe("demo", [*case.overrides, f"model.path={model}"])
        settings, load, _ = settings_of(planned, 1)
        (setting,) = settings if gpu else on_cpu(settings)
        found = moments(setting, load)
        measured = _train(planned, case.algorithm, manifest, model, Path(folder) / "out", load.prompt, watch)
    largest: dict[str, float] = {}
    for moment in found:
        what = "look" if moment.name.startswith("look") else "step"
        largest[what] = max(largest.get(what, 0.0), moment.total)
    by_moment = {moment.name: moment.total for moment in found}
    return {"case": asdict(case), "predicted": largest, "measured": measured, "moments": by_moment}


def _train(
    recipe: Any, algorithm: str, manifest: Path, model: Path, out: Path, prompt: int, watch: Any
) -> dict[str, float]:
    """Most bytes that tensors held in the second step, and in the look at the end."""
    from transformers import TrainerCallback

    from appo.training import rewarding, rollouts, run
    from benchmarks.cells import pseudo_accuracy

    measured: dict[str, float] = {}

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                watch.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                measured["step"] = watch.stop()

    made: list[Any] = []
    opened, looked = run._Session.open.__func__, run._Session.look

    def open_session(cls: Any, *args: Any, **kwargs: Any) -> Any:
        session = opened(cls, *args, **kwargs)
        session.trainer.add_callback(Steps())
        made.append(session.trainer)
        return session

    def look(session: Any, *args: Any, step: int, **kwargs: Any) -> Any:
        if step == 0:
            return looked(session, *args, step=step, **kwargs)
        watch.start()
        seen = looked(session, *args, step=step, **kwargs)
        measured["look"] = watch.stop()
        return seen

    run._Session.open, run._Session.look = classmethod(open_session), look  # type: ignore[assignment, method-assign]
    rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}
    _never_end(rollouts.DrawPerRow, model)
    run.train(
        recipe,
        algorithm=algorithm,
        seed=0,
        manifest_path=manifest,
        model_path=str(model),
        out=out,
        progress=False,
    )
    lengths = {len(p.ids) for p in made[0].rollouts.prompts}
    if lengths != {prompt}:
        raise SystemExit(f"prompts have {sorted(lengths)} tokens, the plan says {prompt}")
    return measured


class Watch:
    """Bytes of live tensors between `start` and `stop`."""

    def start(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        self._before = _live_bytes()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()

    def stop(self) -> float:
        """The most since `start`."""
        self._profile.__exit__(None, None, None)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
        return float(max(accumulate(changes, initial=self._before)))


class GpuWatch:
    """The same of a GPU's tensors, which torch's allocator counts itself."""

    def __init__(self) -> None:
        """First of all in a process: what products leave behind is cuBLAS's, not a tensor of ours."""
        import torch

        for dtype in (torch.bfloat16, torch.float32):
            one = torch.ones(256, 256, device="cuda", dtype=dtype)
            torch.nn.functional.linear(one @ one, one, one[0])
            del one
        torch.cuda.synchronize()
        self._workspaces = torch.cuda.memory_allocated()

    def start(self) -> None:
        import torch

        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()

    def stop(self) -> float:
        import torch

        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - self._workspaces)


def _live_bytes() -> int:
    """Of every tensor that Python knows; at a step's edge autograd holds no others."""
    import torch

    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu" and thing.layout == torch.strided:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _never_end(draw: Any, model: Path) -> None:
    """Rule end tokens out of every draw."""
    ends = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    drawn: Callable[..., Any] = draw.__call__

    def draw_on(self: Any, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        scores[:, ends] = float("-inf")
        return drawn(self, input_ids, scores)

    draw.__call__ = draw_on


if __name__ == "__main__":
    sys.exit(main())
