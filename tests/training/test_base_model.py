"""The commit of a model on the hub: looked up once a run, the same for every pod, and written down everywhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from appo import plan
from tests.hub_server import Hub
from tests.tiers import long
from tests.training.conftest import OVERRIDES

BEFORE, AFTER = "b" * 40, "a" * 40
# Each step of a run is a process of its own, with a cache of its own, as pods have.
STEP = """
import json, sys
from pathlib import Path
from appo import plan, steps
from appo.handover import checkpoint_of
recipe = plan.resolve(Path(sys.argv[1]).read_text())
storage, manifest = sys.argv[2], sys.argv[3]
"""
NAME_IT = "print('LOCATION', steps.base_model(recipe, storage, manifest=manifest).location)"
TRAIN = "steps.train(recipe, storage, plan.Training('grpo', 0), manifest=manifest, model=sys.argv[4])"
FETCH = "print('FOLDER', checkpoint_of(sys.argv[4]))"


def said(output: str, word: str) -> str:
    return next(line.split()[1] for line in output.splitlines() if line.startswith(word))


@long
@pytest.mark.slow
def test_a_run_keeps_the_commit_that_it_looked_up(small_set: tuple[Path, Path], tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    from appo.reports.results import read_trainings

    manifest, model = small_set
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "generation_config.json").write_text("{}")
    storage = tmp_path / "run"
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    overrides = [*OVERRIDES, "model.path=org/tiny@v1", "training.max_steps=1", f"tracking.uri={store}"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(plan.resolve("demo", overrides).to_yaml())

    with Hub("org/tiny", {BEFORE: model, AFTER: other}, {"v1": BEFORE, "main": AFTER}) as server:

        def step(what: str, pod: str, *more: str) -> str:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            environment |= {"HF_HOME": str(tmp_path / pod), "HF_ENDPOINT": server.address}
            command = [sys.executable, "-c", STEP + what, str(recipe), str(storage), str(manifest), *more]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=200, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            return done.stdout

        location = said(step(NAME_IT, "pod-1"), "LOCATION")
        assert location == f"org/tiny@{BEFORE}"
        assert len(server.looked_up) == 1
        server.references["v1"] = AFTER  # somebody pushes
        assert said(step(NAME_IT, "pod-2"), "LOCATION") == location  # a retried step, a continued run
        step(TRAIN, "pod-3", location)
        folder = Path(said(step(FETCH, "pod-4", location), "FOLDER"))  # the evaluation's pod
        assert len(server.looked_up) == 1
    assert folder.name == BEFORE
    assert (folder / "generation_config.json").read_text() == (model / "generation_config.json").read_text()

    training = Path(plan.layout(plan.resolve(recipe.read_text()), str(storage)).trainings) / "grpo-seed0"
    told = json.loads((training / "checkpoint" / "base_model.json").read_text())
    assert told == {"model": "org/tiny", "commit": BEFORE}
    (result,) = read_trainings([training])
    assert (result.summary["base_model"], result.summary["base_commit"]) == ("org/tiny", BEFORE)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.tags["appo.role"] for run in runs} == {"parent", "training"}
    for run in runs:
        assert run.data.tags["appo.model"] == "org/tiny"
        assert run.data.tags["appo.model_commit"] == BEFORE
        assert run.data.params["model"] == location
