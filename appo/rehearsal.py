"""A recipe -> the same run once, small in everything but the model: does it fit, how long does each part take?

The recipe's architecture at full width and depth from its published configuration, random weights in bfloat16, adapters,
one video of the recipe's frames and pixels, a handful of tokens and completions, on this machine's CPU. What runs is the
run's own code: assembly, loading, rollouts, scoring with the frame probe, token weights, update, checkpoints, merging,
evaluation. Each stage is a process of its own, whose peak is the kernel's count of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from appo.config import Recipe, parse_recipe
from appo.errors import SettingError, UserError

GIB = 1 << 30
SAMPLED_EVERY_S = 0.02
COMPLETIONS, TOKENS = 2, 16
STAGES = ("build", "train", "rollout_vllm", "evaluate")
# An engine holds the weights, its cache and what loading needs beside them.
ENGINE_FACTOR = 1.5


class RehearsalError(UserError, RuntimeError):
    """A stage that did not come to its end: its name and its last lines."""


@dataclass(frozen=True, slots=True)
class Phase:
    """seconds, peak_gib: None where it was left out, for the reason in `skipped`. planned_gib: as `appo plan` counts,
    None where it has no line for the phase.
    """

    name: str
    seconds: float | None
    peak_gib: float | None
    planned_gib: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Rehearsal:
    recipe: str
    parameters: int
    layers: int
    phases: tuple[Phase, ...]
    peak_gib: float
    estimates: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def rehearse(recipe: Recipe, *, layers: int | None = None, progress: bool = True) -> Rehearsal:
    """Run every stage in a folder that is removed afterwards. Raises RehearsalError, SettingError,
    and UnknownArchitecture.
    """
    from appo.modeling.architecture import architecture_of

    architecture = architecture_of(str(recipe.model.path))
    if layers is not None and not 1 <= layers <= architecture.text.layers:
        raise SettingError(
            f"--layers {layers}: {recipe.model.path} has {architecture.text.layers}; give 1 to all of them"
        )
    with tempfile.TemporaryDirectory(prefix="appo-rehearse-") as folder:
        small = rehearsed(recipe, Path(folder) / "model")
        phases: list[Phase] = []
        parameters, peak, plan = 0, 0.0, dict[str, float]()
        for stage in STAGES:
            if progress:
                print(f"> {stage}", file=sys.stderr, flush=True)
            found = _run(stage, small, Path(folder), {"layers": layers, "model": recipe.model.path})
            parameters = found.get("parameters", parameters)
            plan = plan or planned(small)  # of the checkpoint that the first stage has made
            phases += [Phase(**phase, planned_gib=plan.get(phase["name"])) for phase in found["phases"]]
            peak = max(peak, found["peak_gib"])
    depth = architecture.text.layers if layers is None else layers
    return Rehearsal(recipe.name, parameters, depth, tuple(phases), round(peak, 2), ESTIMATES)


ESTIMATES = (
    "prompt tokens beside the video: the tokenizer is byte-level, a published one needs about a third as many",
    f"completions: {COMPLETIONS} of {TOKENS} tokens; seconds and memory of rollouts and updates grow with both",
    "seconds: of this CPU; peaks: of a whole process, about 1 GiB of programs included, planned: of its tensors alone",
)


# Phase of a training, as its records name it -> the moments of the plan that lie in it.
MOMENTS = {
    "load and look": ("look", "encode"),
    "look": ("look",),
    "rollout": ("rollout",),
    "scoring": ("score",),
    "update": ("update", "optimizer"),
}


def planned(recipe: Recipe) -> dict[str, float]:
    """GiB of tensors by phase of the rehearsed training, as `appo plan` counts them for a CPU."""
    from appo.planning.memory import moments
    from appo.planning.setting import on_cpu, settings_of

    settings, load, _ = settings_of(recipe, 1)
    found = [moment for setting in on_cpu(settings) for moment in moments(setting, load)]
    return {
        phase: round(max(totals), 4)
        for phase, names in MOMENTS.items()
        if (totals := [moment.total / GIB for moment in found if moment.name.startswith(names)])
    }


def rehearsed(recipe: Recipe, model: Path) -> Recipe:
    """The recipe as it is rehearsed: its frames, pixels, template, decoding; adapters, one prompt, one step."""
    side = max(28, int(recipe.video.max_pixels**0.5) // 28 * 28)
    frames = recipe.video.num_frames or 32
    algorithm = "appo" if "appo" in recipe.algorithms else recipe.algorithms[0]
    moment = {
        "train": 1,
        "validation": 1,
        "test": 1,
        "easy_train": 0,
        "num_frames": max(4, frames),
        "size": side,
    }
    values = recipe.model_dump(mode="json")
    values["algorithms"] = [algorithm]
    values["data"] = {
        "source": "key_moment",
        "template": recipe.data.template,
        "workers": 1,
        "key_moment": {**moment, "distractors": 1},
    }
    values["model"] |= {"path": str(model), "dtype": "bfloat16", "warm_start": None}
    values["model"]["lora"] = values["model"]["lora"] or {}
    values["policy"] |= {
        "algorithm": algorithm,
        "num_generations": COMPLETIONS,
        "max_completion_length": TOKENS,
        "dynamic_sampling": False,
        "judge": {},
    }
    # Random weights answer nothing: with every completion "right" there are crucial frames to weigh tokens by.
    values["perception"] |= {"tau": -1.0}
    values["training"] |= {
        "prompts_per_step": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 1,
        "save_every": 1,
        "seeds": [0],
        "rollout": "transformers",
        "distributed": "ddp",
        "feature_cache_dir": None,
    }
    values["evaluation"] |= {
        "benchmarks": ["key_moment"],
        "annotations": None,
        "videos": None,
        "max_tokens": TOKENS,
        "max_num_seqs": 1,
        "seeds": 1,
        "data_parallel": 1,
        "limit": None,
    }
    return parse_recipe(json.dumps(values))


def table(found: Rehearsal) -> str:
    """What people read: one line a phase, then the whole."""
    lines = [f"{found.recipe}: {found.parameters:,} parameters, {found.layers} decoder layers", ""]
    lines.append(f"  {'phase':<16}{'seconds':>9}{'peak GiB':>10}{'planned':>9}")
    for phase in found.phases:
        if phase.skipped:
            lines.append(f"  {phase.name:<16}left out: {phase.skipped}")
            continue
        planned = "-" if phase.planned_gib is None else f"{phase.planned_gib:.2f}"
        lines.append(f"  {phase.name:<16}{phase.seconds:>9.1f}{phase.peak_gib:>10.2f}{planned:>9}")
    lines += ["", f"largest process: {found.peak_gib:.2f} GiB", "estimates, not measurements of a run:"]
    return "\n".join([*lines, *(f"* {estimate}" for estimate in found.estimates)])


def _run(stage: str, recipe: Recipe, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One stage in a process of its own; what it measured."""
    job = folder / f"{stage}.json"
    job.write_text(
        json.dumps({"recipe": recipe.to_json(), "folder": str(folder), **options}), encoding="utf-8"
    )
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "appo.rehearsal", stage, str(job)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    result = folder / f"{stage}.result.json"
    if done.returncode or not result.is_file():
        killed = "; it was killed, for want of memory as a rule" if done.returncode == -9 else ""
        last = "\n".join(done.stdout.strip().splitlines()[-4:])
        raise RehearsalError(f"{stage}: ended with status {done.returncode}{killed}:\n{last}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


@dataclass
class Meter:
    """Seconds and peak memory of this process by phase, sampled by a thread."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    current: str = ""
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Meter:
        threading.Thread(target=self._sample, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Bill what happens inside to a phase; an inner phase takes over for its time."""
        outer, self.current = self.current, name
        self.seconds.setdefault(name, 0.0)
        self.peaks[name] = max(self.peaks.get(name, 0.0), resident_gib())
        began = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self.seconds[name] += elapsed
            if outer in self.seconds:
                self.seconds[outer] -= elapsed
            self.current = outer

    def phases(self, *names: str) -> list[dict[str, Any]]:
        return [
            {"name": name, "seconds": round(self.seconds[name], 2), "peak_gib": round(self.peaks[name], 2)}
            for name in names or self.seconds
        ]

    def _sample(self) -> None:
        while not self._over.wait(SAMPLED_EVERY_S):
            if name := self.current:
                self.peaks[name] = max(self.peaks.get(name, 0.0), resident_gib())


def resident_gib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def peak_gib() -> float:
    """Of this process so far, as the kernel counts it."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def available_gib() -> float:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) / (1 << 20)


def build(recipe: Recipe, folder: Path, meter: Meter, layers: int | None, model: str) -> dict[str, Any]:
    """Videos, manifest, and the checkpoint with random weights."""
    from appo.data.assemble import assemble
    from appo.data.manifest import read_manifest
    from appo.data.messages import prompt_messages
    from appo.modeling.architecture import architecture_of
    from appo.training.random_checkpoint import write_random_checkpoint

    with meter("data"):
        made = assemble(recipe, folder / "data", progress=False)
    sample = read_manifest(made.manifest).samples[0]
    messages = prompt_messages(
        sample, recipe.data.template, duration_s=sample.duration_s, num_frames=recipe.video.num_frames
    )
    text = messages[0]["content"][-1]["text"]
    with meter("build"):
        parameters = write_random_checkpoint(
            architecture_of(model),
            Path(str(recipe.model.path)),
            texts=[text],
            dtype="bfloat16",
            layers=layers,
        )
    return {"parameters": parameters}


def train(recipe: Recipe, folder: Path, meter: Meter, **_: Any) -> dict[str, Any]:
    """One training of one step, with its looks and checkpoints."""
    from appo.training.run import train as run_training

    with meter("load and look"):
        run_training(
            recipe,
            algorithm=recipe.policy.algorithm,
            seed=0,
            manifest_path=folder / "data" / "manifest.jsonl",
            model_path=str(recipe.model.path),
            out=folder / "train",
            progress=False,
            on_phase=meter,
        )
    return {}


def rollout_vllm(recipe: Recipe, folder: Path, meter: Meter, **_: Any) -> dict[str, Any]:
    """The same prompt through vLLM as rollouts use it, and weights handed over; left out where memory does not do."""
    from appo.evaluation.checkpoints import weights_bytes

    needed = ENGINE_FACTOR * weights_bytes(str(recipe.model.path)) / GIB
    if needed > available_gib():
        reason = f"an engine needs about {needed:.1f} GiB, {available_gib():.1f} are free"
        return {"skipped": {"rollout_vllm": reason}}
    from appo.data.frames import open_frames
    from appo.data.manifest import read_manifest
    from appo.evaluation.prompts import positions_model
    from appo.modeling.inputs import build_inputs
    from appo.modeling.loading import load_processor
    from appo.modeling.vllm_worker import read_weights
    from appo.training.vllm_rollouts import ColocatedEngine

    path = str(recipe.model.path)
    manifest = read_manifest(folder / "data" / "manifest.jsonl")
    sample = manifest.split("train")[0]
    with meter("rollout_vllm"):
        frames = open_frames(manifest, recipe).load(sample)
        prompt = build_inputs(
            load_processor(path), positions_model(path), sample, frames, None, template=recipe.data.template
        )
        longest = len(prompt.ids) + TOKENS
        settings = recipe.training.model_copy(update={"vllm_max_model_len": longest})
        engine = ColocatedEngine(
            path, recipe.model_copy(update={"training": settings}), max_num_seqs=COMPLETIONS
        )
        engine.generate(
            [prompt], [{"n": COMPLETIONS, "max_tokens": TOKENS, "temperature": 1.0, "logprobs": 0}]
        )
        engine.load_policy(read_weights(Path(path)))
        engine.close()
    return {}


def evaluate(recipe: Recipe, folder: Path, meter: Meter, **_: Any) -> dict[str, Any]:
    """The trained adapters merged, loaded again, and one item of a benchmark."""
    from appo.evaluation.checkpoints import weights_bytes
    from appo.evaluation.run import evaluate as run_evaluation
    from appo.modeling.adapters import whole_checkpoint

    checkpoint = str(folder / "train" / "checkpoint")
    with meter("merge"):
        whole = whole_checkpoint(checkpoint, lambda: str(recipe.model.path))
    needed = ENGINE_FACTOR * weights_bytes(whole) / GIB
    if recipe.evaluation.engine == "vllm" and needed > available_gib():
        reason = f"an engine needs about {needed:.1f} GiB, {available_gib():.1f} are free"
        return {"skipped": {"evaluate": reason}}
    with meter("evaluate"):
        run_evaluation(
            recipe,
            checkpoints={"trained": whole},
            manifest_path=folder / "data" / "manifest.jsonl",
            out=folder / "evaluation",
            progress=False,
        )
    return {}


def main(stage: str, job: str) -> None:
    """One stage, in its own process."""
    values = json.loads(Path(job).read_text(encoding="utf-8"))
    recipe, folder = parse_recipe(values["recipe"]), Path(values["folder"])
    with Meter() as meter:
        stages: dict[str, Callable[..., dict[str, Any]]] = {
            "build": build,
            "train": train,
            "rollout_vllm": rollout_vllm,
            "evaluate": evaluate,
        }
        found = stages[stage](recipe, folder, meter, layers=values["layers"], model=values["model"])
    skipped = found.pop("skipped", {})
    phases = meter.phases() + [
        {"name": name, "seconds": None, "peak_gib": None, "skipped": why} for name, why in skipped.items()
    ]
    result = {**found, "phases": phases, "peak_gib": peak_gib()}
    (folder / f"{stage}.result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
