"""The exit handler: what a killed pod left open is closed as failed; other pipelines' runs are left alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from appo.closing import close_runs
from appo.folders import local_folder
from appo.objectstore import put_file
from tests.data_room.stores import FaultyProxy

KILLED = """
import os, sys
from pathlib import Path
from appo.config import load_recipe
from appo.tracking import start_training

storage = Path(sys.argv[1])
place = storage / "abc" / "train" / sys.argv[2]
tracker = start_training(
    load_recipe("demo", [f"tracking.uri=sqlite:///{storage / 'mlflow.db'}"]), storage,
    algorithm="appo", seed=0, model="base", manifest_digest=sys.argv[2], journals=place / "tracking",
)
tracker.log_metrics({"reward": 0.5}, step=1)
assert tracker.run_id
os._exit(137)
"""


@pytest.mark.slow
def test_runs_of_killed_pods_are_closed_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    for run, name in (("this-run", "appo-seed0"), ("other-run", "appo-seed1")):
        environment = {**os.environ, "KFP_RUN_ID": run}
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), name],
            env=environment,
            check=False,
            capture_output=True,
        )
        assert done.returncode == 137, done.stderr.decode()[-2000:]
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def states() -> dict[str, str]:
        runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
        trainings = [run for run in runs if run.data.tags.get("appo.role") == "training"]
        return {run.data.tags["appo.kfp_run_id"]: run.info.status for run in trainings}

    assert states() == {"this-run": "RUNNING", "other-run": "RUNNING"}
    monkeypatch.setenv("KFP_RUN_ID", "this-run")
    outcomes = close_runs(str(tmp_path))
    assert len(outcomes) == 1
    assert states() == {"this-run": "FAILED", "other-run": "RUNNING"}


@pytest.mark.slow
def test_journals_that_lie_in_s3_are_sent_and_remember_it(
    s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed pod had mirrored, from a machine that never saw the pod, by the command and a second time."""
    from mlflow.tracking import MlflowClient
    from typer.testing import CliRunner

    from appo.cli import app

    pod, storage = tmp_path / "pod", f"s3://data/{uuid.uuid4()}"
    subprocess.run(
        [sys.executable, "-c", KILLED, str(pod), "appo-seed0"], check=False, capture_output=True, timeout=120
    )
    for path in sorted(pod.glob("abc/**/tracking/*")):
        put_file(f"{storage}/{path.relative_to(pod).as_posix()}", path)
    monkeypatch.setenv("APPO_SCRATCH", str(tmp_path / "scratch"))
    said = []
    for _ in range(2):
        done = CliRunner().invoke(app, ["tracking", "upload", storage])
        assert done.exit_code == 0, done.output
        said.append(done.output)
        shutil.rmtree(local_folder(storage))
    # At least the end that the pod could not write; how much the pod itself had sent is a matter of luck.
    assert ": 0 events sent" not in said[0]
    assert ": 0 events sent" in said[1]
    client = MlflowClient(f"sqlite:///{pod / 'mlflow.db'}")
    runs = client.search_runs(
        [client.get_experiment_by_name("demo").experiment_id], "tags.`appo.role` = 'training'"
    )
    assert [run.info.status for run in runs] == ["FAILED"]
    assert "killed" in runs[0].data.tags["appo.reason"]
    assert [m.value for m in client.get_metric_history(runs[0].info.run_id, "reward")] == [0.5]
