"""A training that is killed, then told to go, then left alone ends as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from appo.training.launch import EXIT_INTERRUPTED, write_job
from tests.tiers import long
from tests.training.conftest import Bench

STEPS = 8
SETTINGS = (f"training.max_steps={STEPS}", "training.save_every=2")
PROCESS = """
import sys
import torch
import appo.training.rewarding
from tests.training.conftest import pseudo_accuracy
appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}
from appo.training.launch import main
torch.set_num_threads(1)
sys.exit(main(sys.argv[1]))
"""


@pytest.mark.slow
@long
def test_killed_and_stopped_trainings_end_as_an_undisturbed_one(bench: Bench, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes below: sums in the same order
    bench.train("appo", *SETTINGS, name="undisturbed")
    torch.set_num_threads(threads)

    killed = start(bench, tmp_path)
    wait_for_steps(killed, bench, 3)  # past the checkpoint of step 2, before that of step 4 as a rule
    killed.kill()
    killed.wait()

    stopped = start(bench, tmp_path)
    wait_for_steps(stopped, bench, 5)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) == EXIT_INTERRUPTED, stopped.communicate()

    last = start(bench, tmp_path)
    said = last.communicate(timeout=240)[0]
    assert last.returncode == 0, said
    summary = json.loads((bench.folder / "disturbed" / "summary.json").read_text())
    assert summary["resumed_from"] >= 5  # the step at which it was told to go, whatever the rhythm of saving
    undisturbed, disturbed = bench.weights("undisturbed"), bench.weights("disturbed")
    assert all(torch.equal(undisturbed[name], disturbed[name]) for name in undisturbed)
    assert [line["step"] for line in bench.metrics("disturbed")] == list(range(1, STEPS + 1))
    assert mlflow_steps(tmp_path, "grad_norm") == list(range(1, STEPS + 1))  # one run, every step once


def start(
    bench: Bench, folder: Path, settings: tuple[str, ...] = SETTINGS, *, algorithm: str = "appo"
) -> subprocess.Popen[str]:
    """The same training each time, in a process of its own, logging to an MLflow file."""
    out = bench.folder / "disturbed"
    tracking = {
        "run_dir": str(folder),
        "journals": str(out / "tracking"),
        "model": str(bench.model),
        "manifest_digest": "d" * 64,
    }
    job = write_job(
        folder / "job.json",
        bench.recipe(*settings),
        algorithm=algorithm,
        seed=0,
        manifest_path=bench.manifest,
        model_path=str(bench.model),
        out=out,
        progress=False,
        tracking=tracking,
    )
    script = folder / "process.py"
    script.write_text(PROCESS, encoding="utf-8")
    root = Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, str(script), str(job)],
        cwd=root,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(process: subprocess.Popen[str], bench: Bench, steps: int) -> None:
    path = bench.folder / "disturbed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no steps"
        time.sleep(0.01)


def mlflow_steps(folder: Path, metric: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    (run,) = client.search_runs([experiment.experiment_id], "tags.`appo.role` = 'training'")
    assert run.info.status == "FINISHED", json.dumps(run.data.tags)
    return [m.step for m in client.get_metric_history(run.info.run_id, metric)]
