"""One launch of the matrix: trainings of one layout and type, one after another, on fixed completions.

For the matrix of tests/training/test_matrix.py and for `make gpu-check`, so it imports nothing of tests but for sharded
layouts on CPUs. Run by `accelerate launch`, or alone for one process. What rollouts would draw is a function of the
sample and the member, so that every cell scores and trains on the same tokens with the same rewards, and
log-probabilities, gradients and updates can be compared between layouts and types.

    python -m benchmarks.cells JOB      JOB: JSON, see `Job`
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ALGORITHMS = ("grpo", "dapo", "appo", "pa_grpo")
OVERRIDES = (
    "data.key_moment.train=32",
    "data.key_moment.validation=2",
    "data.key_moment.test=2",
    "data.key_moment.easy_train=4",
    "policy.num_generations=4",
    "policy.max_completion_length=8",
    "training.prompts_per_step=4",
    "training.max_steps=2",
    "training.learning_rate=1e-3",
    "perception.k3=4",
    "policy.reward_weights={accuracy: 1.0}",
)


def pseudo_accuracy(text: str, _sample: object) -> float:
    """Differs between completions of an untrained model, which never answers: a checksum of the text."""
    return float(sum(text.encode()) % 3 == 0)


def small_set(folder: Path, manifest: Path | None = None, shape: Any = None) -> tuple[Path, Path]:
    """A small key-moment set, made unless its manifest is given, and an untrained model of it: (manifest, folder).

    shape: of the model (`TinyShape`), the demo's where None.
    """
    from appo.config import load_recipe
    from appo.data.assemble import assemble
    from benchmarks.gpu_check.small_set import make_model

    recipe = load_recipe("demo", list(OVERRIDES))
    if manifest is None:
        manifest = assemble(recipe, folder / "data", progress=False).manifest
    return manifest, make_model(recipe, manifest, folder / "model", shape)


def tied(model: Path, folder: Path) -> Path:
    """The same model with one matrix for both embeddings."""
    from transformers import AutoModelForImageTextToText

    shutil.copytree(model, folder)
    made = AutoModelForImageTextToText.from_pretrained(model)
    made.config.tie_word_embeddings = made.config.text_config.tie_word_embeddings = True
    made.tie_weights()
    made.save_pretrained(folder)
    return folder


# The paper's: a step of Adam that bfloat16 weights would not take.
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Cell:
    """One training. killed_after: the process dies in the step after this one, of SIGKILL. abandoned_after: the training
    alone ends there, in an exception, and the launch goes on. tied: the model's input and output embeddings are one
    (3B's are, 7B's are not).
    """

    algorithm: str
    shared_prefix: bool
    lora: bool
    steps: int = 10
    save_every: int = 1000
    killed_after: int | None = None
    abandoned_after: int | None = None
    folder: str | None = None
    tied: bool = False

    @property
    def name(self) -> str:
        parts = (self.algorithm, "shared" if self.shared_prefix else "plain", "lora" if self.lora else "full")
        return self.folder or "-".join((*parts, "tied") if self.tied else parts)


@dataclass(frozen=True)
class Job:
    """layout: of `training.distributed`, or "one" for a process without a launcher."""

    layout: str
    dtype: str
    manifest: str
    model: str
    tied_model: str
    out: str
    cells: list[Cell]

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def read(cls, path: str) -> Job:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**values, "cells": [Cell(**cell) for cell in values["cells"]]})


def every_cell() -> tuple[Cell, ...]:
    """The matrix's, of one layout and type: algorithms x shared prefix x adapters, and one with tied embeddings."""
    crossed = itertools.product(ALGORITHMS, (True, False), (False, True))
    return (*(Cell(*values) for values in crossed), Cell("appo", True, False, tied=True))


def read(folder: Path) -> dict[str, Any]:
    """What a cell left."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {**torch.load(folder / "cell.pt"), "steps": [json.loads(line) for line in lines]}


def recipe_of(layout: str, dtype: str, cell: Cell) -> Any:
    from appo.config import load_recipe

    settings = [
        f"model.dtype={dtype}",
        f"training.distributed={'ddp' if layout == 'one' else layout}",
        f"training.shared_prefix={str(cell.shared_prefix).lower()}",
        # As recipes of real models have it, against a reference without.
        f"training.gradient_checkpointing={str(dtype == 'bfloat16').lower()}",
        f"training.learning_rate={LEARNING_RATE}",
        f"training.max_steps={cell.steps}",
        "training.prompts_per_step=2",  # one group a process: the matrix takes 180 trainings
        f"training.save_every={cell.save_every}",
        *(["model.lora={rank: 4}"] if cell.lora else []),
    ]
    return load_recipe("demo", [*OVERRIDES, *settings])


class Abandoned(Exception):
    """A training that was to end here."""


class Watcher:
    """What one training's passes left: log-probabilities of the first update, masters before and after."""

    def __init__(self, layout: str, cell: Cell):
        self.layout, self.cell = layout, cell
        self.trainer: Any = None
        self.logps: list[torch.Tensor] = []
        self.before: dict[str, torch.Tensor] = {}

    def step_begins(self, trainer: Any) -> None:
        if self.cell.killed_after is not None and trainer.state.global_step == self.cell.killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.cell.abandoned_after is not None and trainer.state.global_step == self.cell.abandoned_after:
            raise Abandoned
        if self.trainer is None:
            if self.layout != "one":
                from tests.cpu_layouts import assert_ran

                assert_ran(trainer, self.layout)
            self.trainer, self.before = trainer, masters(trainer)

    def scored(self, trainer: Any, logps: torch.Tensor) -> None:
        if trainer._loss_inputs is not None and trainer.state.global_step == 0:
            padded = torch.zeros(len(logps), 8)
            padded[:, : logps.shape[1]] = logps.detach().float().cpu()
            self.logps.append(trainer.accelerator.gather(padded))

    def write(self, path: Path) -> None:
        trainer, after = self.trainer, masters(self.trainer)  # collective
        types = sorted({str(p.dtype) for p in trainer._policy().parameters()})
        reference = trainer.ref_model and sorted({str(p.dtype) for p in trainer.ref_model.parameters()})
        if trainer.is_world_process_zero():
            found = {"before": self.before, "after": after, "types": types, "reference": reference}
            temporary = path.with_suffix(".part")
            torch.save({**found, "logps": torch.cat(self.logps) if self.logps else None}, temporary)
            temporary.replace(path)  # another process may be waiting for it


def masters(trainer: Any) -> dict[str, torch.Tensor]:
    """Float32 values of everything that trains, whole, wherever the layout keeps them. Collective."""
    from appo.training.layouts import whole_tensor

    trained = [(name, p) for name, p in trainer._policy().named_parameters() if p.requires_grad]
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).clone().cpu() for name, p in trained}
    return {name: whole_tensor(p, torch.float32).clone().cpu() for name, p in trained}


def fix_rollouts() -> None:
    """Completions, verdicts of the judge and spans as functions of what they belong to."""
    import appo.policy.judge
    import appo.training.rewarding
    import appo.training.trainer
    from appo.training.sampling import stream_seed

    drawn = appo.training.trainer.VideoGRPOTrainer._roll_out

    def roll_out(self, num_generations):
        if not self._agreement_checked:
            drawn(
                self, num_generations
            )  # for real once: generation agrees with scoring where the policy lies so
            assert self._agreement_checked
        found = []
        first = self.accelerator.process_index * len(self.rollouts.prompts)
        for place, prompt in enumerate(self.rollouts.prompts, first):
            key = stream_seed(sum(prompt.sample.id.encode()), place % num_generations)
            generator = torch.Generator().manual_seed(key)
            length = 3 + int(torch.randint(6, (1,), generator=generator))
            found.append(torch.randint(20, 200, (length,), generator=generator).tolist())
        return found, None

    def masks(pieces, num_tokens):
        return {"observation": (torch.arange(num_tokens) < 3).expand(len(pieces), -1)}

    def verdicts(_judge, texts, _samples):
        return [float(sum(text.encode()) % 2) for text in texts]

    appo.training.trainer.VideoGRPOTrainer._roll_out = roll_out
    appo.training.trainer.tag_masks = masks
    appo.policy.judge.perception_rewards = verdicts
    appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}


def watch() -> list[Watcher]:
    """Let the trainer tell the last watcher of the list what it does."""
    from appo.training.trainer import VideoGRPOTrainer

    watchers: list[Watcher] = []
    step, score = VideoGRPOTrainer.training_step, VideoGRPOTrainer._get_per_token_logps_and_entropies

    def training_step(self, *args, **kwargs):
        watchers[-1].step_begins(self)
        return step(self, *args, **kwargs)

    def get_logps(self, *args, **kwargs):
        found = score(self, *args, **kwargs)
        watchers[-1].scored(self, found[0])
        return found

    VideoGRPOTrainer.training_step = training_step
    VideoGRPOTrainer._get_per_token_logps_and_entropies = get_logps
    return watchers


class Trainings:
    """Trains cells one after another; made once in a process, since it changes the trainer's class."""

    def __init__(self, layout: str, dtype: str, manifest: Path):
        from appo.startup import UNUSED_BY_TRAINING, heavy_imports, leave_out

        if not layout.startswith("zero"):
            leave_out("deepspeed")
        with heavy_imports(without=UNUSED_BY_TRAINING):
            if layout != "one":
                from tests.cpu_layouts import install

                install()
            fix_rollouts()
            self.watchers = watch()
        self.layout, self.dtype, self.manifest = layout, dtype, manifest

    def run(self, cell: Cell, model: str, out: Path) -> Any:
        """Leaves the training's own files in `out`, and cell.pt last where it ends; returns the trainer."""
        from appo.training.run import train

        self.watchers[:] = [watcher := Watcher(self.layout, cell)]
        try:
            train(
                recipe_of(self.layout, self.dtype, cell),
                algorithm=cell.algorithm,
                seed=0,
                manifest_path=self.manifest,
                model_path=model,
                out=out,
                progress=False,
            )
            watcher.write(out / "cell.pt")
            return watcher.trainer
        except Abandoned:
            return watcher.trainer
        finally:
            if watcher.trainer is not None:
                watcher.trainer.accelerator.free_memory()
            self.watchers.clear()


def main(path: str) -> None:
    job = Job.read(path)
    trainings = Trainings(job.layout, job.dtype, Path(job.manifest))
    for cell in job.cells:
        trainings.run(cell, job.tied_model if cell.tied else job.model, Path(job.out) / cell.name)


if __name__ == "__main__":
    main(sys.argv[1])
