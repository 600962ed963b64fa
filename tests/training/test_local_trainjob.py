"""The entry of a TrainJob's pod through the SDK of Kubeflow Trainer, whose local back end stands in for a cluster.

The back end makes an empty virtual environment for each job and would install torch there before it calls its
torchrun. So the job's function runs the pods' own command in this environment instead; our entry starts the processes
itself, as it does in a pod.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from kubeflow.trainer import CustomTrainer, LocalProcessBackendConfig, TrainerClient

from appo.config import load_recipe
from tests.tiers import long
from tests.training.conftest import OVERRIDES

pytestmark = [pytest.mark.slow, long]


def pod(parameters: dict[str, str]) -> None:
    # The SDK copies this function's source into the job: it must stand alone.
    import subprocess
    import sys

    sys.exit(subprocess.run([parameters["python"], "-m", "appo.node"], check=False).returncode)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> TrainerClient:
    monkeypatch.chdir(tmp_path)  # the back end changes the directory of the whole process
    return TrainerClient(backend_config=LocalProcessBackendConfig())


def finished(client: TrainerClient, step: dict[str, str]) -> tuple[str, str]:
    """Run one job to its end -> (its status, its log)."""
    runtime = client.get_runtime("torch-distributed")
    runtime.trainer.framework = (
        "python"  # any other than torch: the function is run by python, not by torchrun
    )
    machine = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **machine, "APPO_STEP": json.dumps(step)}
    trainer = CustomTrainer(func=pod, func_args={"python": sys.executable}, env=environment)
    name = client.train(runtime=runtime, trainer=trainer)
    job = client.wait_for_job_status(name, status={"Complete", "Failed"}, timeout=240)
    return job.status, "\n".join(client.get_job_logs(name))


def test_two_processes_train_as_a_job_of_the_sdk(client, small_set, tmp_path: Path) -> None:
    manifest, model = small_set
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    step = {
        "recipe": load_recipe("demo", [*OVERRIDES, f"tracking.uri={store}"]).to_yaml(),
        "storage": str(tmp_path / "storage"),
        "algorithm": "appo",
        "seed": "0",
        "manifest": str(manifest),
        "model": str(model),
    }
    status, log = finished(client, step)
    assert status == "Complete", log[-5000:]
    (path,) = tmp_path.glob("storage/*/train/*/summary.json")
    summary = json.loads(path.read_text())
    assert (summary["processes"], summary["steps"]) == (2, 2)


def test_a_failed_training_is_a_failed_job_with_its_reason(client, small_set, tmp_path: Path) -> None:
    step = {"recipe": "demo", "storage": str(tmp_path), "algorithm": "appo", "seed": "0"}
    step |= {"manifest": str(tmp_path / "absent.jsonl"), "model": str(small_set[1])}
    status, log = finished(client, step)
    assert status == "Failed"
    assert "absent.jsonl" in log
