"""The stages of a rehearsal, each in a process of its own: `python -m appo.rehearsal.stages STAGE JOB`.

Assembly and a checkpoint with random weights; one training of one step with its looks and checkpoints; the same prompt
through vLLM; adapters merged and loaded again for one item of a benchmark. What runs is the run's own code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from appo.config import Recipe, parse_recipe
from appo.rehearsal.meter import GIB, Meter, available_gib, peak_gib
from appo.rehearsal.smaller import COMPLETIONS, TOKENS

# An engine holds the weights, its cache and what loading needs beside them.
ENGINE_FACTOR = 1.5


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
    """The prompt; then one training of one step, with its looks and checkpoints."""
    from appo.training.run import train as run_training

    manifest = folder / "data" / "manifest.jsonl"
    with meter("processor"):
        inputs = prompt(recipe, folder)
    grids = [grid for vision in (inputs.video, inputs.image) if vision for grid in vision.grid_thw.tolist()]
    facts = {
        "tokens": len(inputs.ids),
        "visual": int((inputs.token_types > 0).sum()),
        "frames": inputs.num_frames,
        "grids": grids,
    }
    del inputs
    with meter("optimizer"), _billed_probe(meter):
        run_training(
            recipe,
            algorithm=recipe.policy.algorithm,
            seed=0,
            manifest_path=manifest,
            model_path=str(recipe.model.path),
            out=folder / "train",
            progress=False,
            on_phase=meter,
        )
    return {"prompt": facts}


def prompt(recipe: Recipe, folder: Path) -> Any:
    """The train split's first prompt, as the processor makes it of the recipe's frames."""
    from appo.data.frames import open_frames
    from appo.data.manifest import read_manifest
    from appo.evaluation.prompts import positions_model
    from appo.modeling.inputs import build_inputs
    from appo.modeling.loading import load_processor

    path = str(recipe.model.path)
    manifest = read_manifest(folder / "data" / "manifest.jsonl")
    sample = manifest.split("train")[0]
    return build_inputs(
        load_processor(path),
        positions_model(path),
        sample,
        open_frames(manifest, recipe).load(sample),
        None,
        template=recipe.data.template,
    )


@contextmanager
def _billed_probe(meter: Meter) -> Iterator[None]:
    """Bill the reading of attention to "probe" in place of the pass that it happens in."""
    from appo.perception.probe import FrameProbe

    original = FrameProbe.read

    def read(self: FrameProbe, *args: Any, **kwargs: Any) -> None:
        # Also a part of the looks, which read attention too.
        with meter("probe"):
            original(self, *args, **kwargs)

    FrameProbe.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        FrameProbe.read = original  # type: ignore[method-assign]


def rollout_vllm(recipe: Recipe, folder: Path, meter: Meter, **_: Any) -> dict[str, Any]:
    """The same prompt through vLLM as rollouts use it, and weights handed over; left out where memory does not do."""
    if reason := _no_engine(str(recipe.model.path)):
        return {"skipped": {"rollout_vllm": reason}}
    from appo.modeling.vllm_worker import read_weights
    from appo.training.vllm_rollouts import ColocatedEngine

    path = str(recipe.model.path)
    with meter("rollout_vllm"):
        inputs = prompt(recipe, folder)
        settings = recipe.training.model_copy(update={"vllm_max_model_len": len(inputs.ids) + TOKENS})
        engine = ColocatedEngine(
            path, recipe.model_copy(update={"training": settings}), max_num_seqs=COMPLETIONS
        )
        engine.generate(
            [inputs], [{"n": COMPLETIONS, "max_tokens": TOKENS, "temperature": 1.0, "logprobs": 0}]
        )
        engine.load_policy(read_weights(Path(path)))
        engine.close()
    return {}


def evaluate(recipe: Recipe, folder: Path, meter: Meter, **_: Any) -> dict[str, Any]:
    """The trained adapters merged, loaded again, and one item of a benchmark; by vLLM where it fits."""
    from appo.evaluation.run import evaluate as run_evaluation
    from appo.modeling.adapters import whole_checkpoint

    checkpoint = str(folder / "train" / "checkpoint")
    with meter("reload"):
        whole = whole_checkpoint(checkpoint, lambda: str(recipe.model.path))
    notes = []
    if recipe.evaluation.engine == "vllm" and (reason := _no_engine(whole)):
        settings = recipe.evaluation.model_copy(update={"engine": "transformers"})
        recipe = recipe.model_copy(update={"evaluation": settings})
        notes = [f"the item was evaluated by transformers: {reason}"]
    with meter("evaluate"):
        run_evaluation(
            recipe,
            checkpoints={"trained": whole},
            manifest_path=folder / "data" / "manifest.jsonl",
            out=folder / "evaluation",
            progress=False,
        )
    return {"notes": notes}


def _no_engine(path: str) -> str:
    """Why vLLM cannot hold a checkpoint here; empty where it can."""
    from appo.evaluation.checkpoints import weights_bytes

    needed, free = ENGINE_FACTOR * weights_bytes(path) / GIB, available_gib()
    return f"vLLM's engine needs about {needed:.1f} GiB, {free:.1f} are free" if needed > free else ""


_STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "build": build,
    "train": train,
    "rollout_vllm": rollout_vllm,
    "evaluate": evaluate,
}


def main(stage: str, job: str) -> None:
    """One stage, in its own process."""
    values = json.loads(Path(job).read_text(encoding="utf-8"))
    recipe, folder = parse_recipe(values["recipe"]), Path(values["folder"])
    with Meter() as meter:
        found = _STAGES[stage](recipe, folder, meter, layers=values["layers"], model=values["model"])
    skipped = found.pop("skipped", {})
    phases = meter.phases() + [
        {"name": name, "seconds": None, "peak_gib": None, "skipped": why} for name, why in skipped.items()
    ]
    result = {**found, "phases": phases, "peak_gib": peak_gib()}
    (folder / f"{stage}.result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
