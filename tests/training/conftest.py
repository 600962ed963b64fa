"""One small key-moment set and one untrained tiny model for all trainer tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from appo.config import Recipe, load_recipe
from benchmarks.cells import OVERRIDES, pseudo_accuracy


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What the processes of a launch themselves said at their end; torchrun's report of them would bury it."""
    lines = "\n".join(line for line in done.stderr.splitlines() if line.startswith("[rank"))
    return lines[-6000:] or done.stdout[-3000:] + done.stderr[-6000:]


@dataclass(frozen=True)
class Bench:
    """Runs small trainings into folders of their own and reads them back."""

    manifest: Path
    model: Path
    folder: Path

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe("demo", [*OVERRIDES, *overrides])

    def train(self, algorithm: str, *overrides: str, seed: int = 0, name: str = "run"):
        from appo.training.run import train

        return train(
            self.recipe(*overrides),
            algorithm=algorithm,
            seed=seed,
            manifest_path=self.manifest,
            model_path=str(self.model),
            out=self.folder / name,
            progress=False,
        )

    def weights(self, name: str = "run") -> dict[str, torch.Tensor]:
        """Of the whole model, or of the adapters where these are what was trained."""
        from safetensors.torch import load_file

        checkpoint = self.folder / name / "checkpoint"
        adapters = checkpoint / "adapter_model.safetensors"
        return load_file(adapters if adapters.exists() else checkpoint / "model.safetensors")

    def metrics(self, name: str = "run") -> list[dict]:
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(manifest, model folder) that tests share and do not write to."""
    from benchmarks.cells import small_set as make

    return make(tmp_path_factory.mktemp("small_set"))


@pytest.fixture
def bench(small_set: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr("appo.training.rewarding.reward_functions", lambda _: {"accuracy": pseudo_accuracy})
    return Bench(*small_set, tmp_path)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


Difference = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], float]
