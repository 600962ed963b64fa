"""Retraining, three times for real and small: the first promotes, equal data does nothing, new data is decided on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import long

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
APPO = Path(sys.executable).parent / "appo"
SMALL = [
    "training.max_steps=1",
    "training.seeds=[0]",
    "training.prompts_per_step=2",
    "model.warm_start.steps=5",
    "data.key_moment.train=8",
    "data.key_moment.easy_train=16",
    "data.key_moment.validation=2",
    "data.key_moment.test=4",
    "evaluation.engine=transformers",  # vLLM is in the test of the whole pipeline
]


def retrain(folder: Path, *more: str) -> str:
    """One retraining; all of them share folder and registry, as those of a schedule do."""
    words = [word for value in (*SMALL, *more) for word in ("--set", value)]
    done = subprocess.run(
        [
            APPO,
            "pipeline",
            "run",
            "-p",
            "retrain",
            "-r",
            "demo",
            "-P",
            "algorithm=grpo",
            "-f",
            folder,
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return done.stdout


def decisions(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("*/report/decision.json")]


@long
def test_three_retrainings(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = tmp_path / "run"
    first = retrain(folder)
    assert "no champion yet" in first
    (decision,) = decisions(folder)
    assert decision["promote"] is True
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (model,) = client.search_registered_models()
    champion = client.get_model_version_by_alias(model.name, "champion")

    second = retrain(folder)
    assert "nothing to do" in second
    assert "reinforcement" not in second
    assert "promote" not in second
    assert client.get_model_version_by_alias(model.name, "champion").version == champion.version

    third = retrain(folder, "data.seed=1")
    assert "the data changed" in third
    new = next(d for d in decisions(folder) if d["champion_mean"] is not None)
    assert new["promote"] == (new["difference"] > new["needed"])
    now = client.get_model_version_by_alias(model.name, "champion")
    assert (now.version != champion.version) == new["promote"]
    assert len(client.search_model_versions(f"name = '{model.name}'")) == 2  # nothing was deleted
