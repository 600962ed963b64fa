"""Runs in a SQLite store: layout, retries, deletion, several processes, and the promise never to raise."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from appo.config import Recipe, load_recipe
from appo.tracking import open_tracker, parameters, start_training
from appo.tracking.sender import upload


def client_of(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(folder: Path) -> dict[str, Any]:
    client = client_of(folder)
    ids = [e.experiment_id for e in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(ids)}


def train_one(recipe: Recipe, folder: Path, *, algorithm: str = "appo", seed: int = 0, **more: Any) -> Any:
    return start_training(
        recipe, folder, algorithm=algorithm, seed=seed, model="warm", manifest_digest="d" * 64, **more
    )


def history(folder: Path, name: str, key: str) -> list[tuple[int, float]]:
    run = runs_of(folder)[name]
    return [(m.step, m.value) for m in client_of(folder).get_metric_history(run.info.run_id, key)]


def test_parent_and_child_with_parameters_tags_and_tables(recipe: Recipe, tmp_path: Path) -> None:
    with train_one(recipe, tmp_path) as tracker:
        for step in range(1, 4):
            tracker.log_metrics({"reward": step / 10, "text": "not a number", "none": None}, step=step)
        tracker.log_table([{"completion": "a", "reward": 1.0}, {"completion": "b", "reward": 0.0}])
        tracker.log_model("appo-seed0", "s3://bucket/x", step=3, metrics={"accuracy": 0.5})
        tracker.log_dataset("manifest", "d" * 64, "data/manifest.jsonl", context="training")
    assert tracker.complaints == []
    runs = runs_of(tmp_path)
    parent, child = runs["appo"], runs["appo seed 0"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.info.status == child.info.status == "FINISHED"
    assert parameters(recipe).items() <= child.data.params.items()
    assert child.data.params["perception.strategy"] == "soft"
    assert child.data.params["seed"] == "0"
    for tag in (
        "appo.recipe_digest",
        "appo.manifest_digest",
        "appo.comparison_digest",
        "mlflow.source.git.commit",
    ):
        assert child.data.tags[tag]
    assert history(tmp_path, "appo seed 0", "reward") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert "text" not in child.data.metrics
    assert json.loads(child.data.tags["mlflow.loggedArtifacts"]) == [
        {"path": "completions.json", "type": "table"}
    ]
    assert (tmp_path / "mlartifacts").is_dir()
    model = client_of(tmp_path).search_logged_models([child.info.experiment_id])[0]
    assert (model.name, model.tags["appo.uri"], [m.value for m in model.metrics]) == (
        "appo-seed0",
        "s3://bucket/x",
        [0.5],
    )
    assert child.inputs.dataset_inputs[0].dataset.digest == "d" * 36


def test_a_raised_error_marks_the_run_failed_with_its_reason(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss is nan"), train_one(recipe, tmp_path):
        raise ValueError("loss is nan, password=hunter2 at postgresql://u:hunter2@db/x")
    run = runs_of(tmp_path)["appo seed 0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["appo.reason"].startswith("ValueError: loss is nan")
    assert "u:hunter2@" not in run.data.tags["appo.reason"]


def test_sending_everything_twice_doubles_nothing(recipe: Recipe, tmp_path: Path) -> None:
    with train_one(recipe, tmp_path) as tracker:
        for step in range(20):
            tracker.log_metrics({"reward": float(step)}, step=step)
        tracker.log_table([{"completion": "a"}])
        tracker.log_model("m", "here")
    before = history(tmp_path, "appo seed 0", "reward")
    for cursor in tmp_path.rglob("*.cursor"):
        cursor.unlink()
    upload(tmp_path)
    assert history(tmp_path, "appo seed 0", "reward") == before == [(s, float(s)) for s in range(20)]
    assert len(runs_of(tmp_path)) == 2
    run = runs_of(tmp_path)["appo seed 0"]
    assert run.info.status == "FINISHED"
    assert len(client_of(tmp_path).search_logged_models([run.info.experiment_id])) == 1


def test_a_retried_pod_continues_its_run_and_notes_changed_parameters(recipe: Recipe, tmp_path: Path) -> None:
    first = train_one(recipe, tmp_path)
    first.log_metrics({"reward": 0.1}, step=1)
    first.end("FAILED", "node lost")
    with train_one(recipe, tmp_path) as tracker:
        tracker.log_params({"data.workers": 99})
        tracker.log_metrics({"reward": 0.2}, step=2)
    runs = runs_of(tmp_path)
    assert set(runs) == {"appo", "appo seed 0"}
    child = runs["appo seed 0"]
    assert (child.info.status, child.data.tags["appo.attempt"]) == ("FINISHED", "2")
    assert json.loads(child.data.tags["appo.changed_params"]) == {"data.workers": "99"}
    assert child.data.params["data.workers"] != "99"
    assert history(tmp_path, "appo seed 0", "reward") == [(1, 0.1), (2, 0.2)]


def test_steps_made_again_after_a_checkpoint_stand_once(recipe: Recipe, tmp_path: Path) -> None:
    """The second process knows nothing of what the first one sent: MLflow says what it has."""
    first = train_one(recipe, tmp_path)
    for step in (1, 2, 3):
        first.log_metrics({"reward": step / 10, "step_s": 1.0}, step=step, once=True)
    first.end("FAILED", "node lost")
    with train_one(recipe, tmp_path) as second:  # its checkpoint is of step 1
        for step in (2, 3, 4):
            second.log_metrics({"reward": step / 10, "step_s": 2.0}, step=step, once=True)
    assert history(tmp_path, "appo seed 0", "step_s") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert [step for step, _ in history(tmp_path, "appo seed 0", "reward")] == [1, 2, 3, 4]


def test_seeds_share_a_parent_and_other_settings_do_not(recipe: Recipe, tmp_path: Path) -> None:
    changed = load_recipe("demo", ["training.learning_rate=1e-6"])
    more_seeds = load_recipe("demo", ["training.seeds=[0,1,2]"])
    for settings, seed in ((recipe, 0), (more_seeds, 1), (changed, 2)):
        with train_one(settings, tmp_path, seed=seed):
            pass
    client = client_of(tmp_path)
    experiment = runs_of(tmp_path)["appo seed 0"].info.experiment_id
    runs = {r.info.run_name: r for r in client.search_runs([experiment], "tags.`appo.role` = 'training'")}
    parents = {name: run.data.tags["mlflow.parentRunId"] for name, run in runs.items()}
    assert parents["appo seed 0"] == parents["appo seed 1"] != parents["appo seed 2"]


def test_a_run_deleted_meanwhile_does_not_stop_anyone(recipe: Recipe, tmp_path: Path) -> None:
    with train_one(recipe, tmp_path) as tracker:
        tracker.log_metrics({"reward": 0.1}, step=1)
        run_id = tracker.run_id
        client_of(tmp_path).delete_run(run_id)
        tracker.log_metrics({"reward": 0.2}, step=2)
    kept = [
        e
        for p in tmp_path.rglob("tracking/*.jsonl")
        for e in map(json.loads, p.open())
        if e["op"] == "metrics"
    ]
    assert [e["values"]["reward"] for e in kept if "reward" in e["values"]] == [0.1, 0.2]
    assert client_of(tmp_path).get_run(run_id).info.lifecycle_stage == "deleted"


def test_an_experiment_deleted_meanwhile_is_brought_back(recipe: Recipe, tmp_path: Path) -> None:
    with train_one(recipe, tmp_path):
        pass
    client = client_of(tmp_path)
    experiment = runs_of(tmp_path)["appo seed 0"].info.experiment_id
    client.delete_experiment(experiment)
    with train_one(recipe, tmp_path, seed=1) as tracker:
        tracker.log_metrics({"reward": 0.5}, step=1)
    assert tracker.complaints == []
    assert client.get_experiment(experiment).lifecycle_stage == "active"
    assert history(tmp_path, "appo seed 1", "reward") == [(1, 0.5)]


def test_an_injected_run_is_attached_and_not_made_again(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(tmp_path)
    experiment = client.create_experiment("kfp")
    injected = client.create_run(experiment, run_name="kfp task").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", injected)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    with train_one(recipe, tmp_path / "elsewhere") as tracker:
        tracker.log_metrics({"reward": 0.5}, step=1)
        assert tracker.run_id == injected
    runs = runs_of(tmp_path)
    assert set(runs) == {"kfp task"}
    assert runs["kfp task"].data.metrics["reward"] == 0.5
    assert runs["kfp task"].data.params["algorithm"] == "appo"
    assert runs["kfp task"].info.status == "RUNNING"  # who injected it closes it


def test_only_the_first_process_of_a_distributed_training_logs(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with train_one(recipe, tmp_path) as tracker:
        tracker.log_metrics({"reward": 0.5}, step=1)
        assert tracker.run_id is None
    assert tracker.complaints == []
    assert list(tmp_path.rglob("*")) == []


def test_nothing_raises_and_every_complaint_is_said_once(recipe: Recipe, tmp_path: Path) -> None:
    tracker = open_tracker(recipe, tmp_path)
    for _ in range(3):
        tracker.log_metrics({"reward": 1.0}, step=1)  # nothing was started
    tracker.log_table([{"a": object()}])
    tracker.end()
    assert len(tracker.complaints) == 2


def test_no_secret_reaches_the_store_or_the_journal(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Zx81-quite-secret")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 30)
    with train_one(recipe, tmp_path) as tracker:
        tracker.set_tags({"s3.secret_access_key": "Zx81-quite-secret", "uri": "s3://u:pw-in-url@host/x"})
        tracker.log_params({"note": "used Zx81-quite-secret", "api_key": "plain"})
        tracker.log_text("token hf_" + "q" * 30, "log.txt")
        tracker.log_table([{"completion": "my key is Zx81-quite-secret"}])
        tracker.log_model("m", "https://u:pw-in-url@host/x")
        tracker.end("FAILED", "cannot open s3://u:pw-in-url@host with Zx81-quite-secret")
    assert tracker.complaints == []
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    for secret in (b"Zx81-quite-secret", b"pw-in-url", b"q" * 30):
        assert secret not in stored


_CHILD = """
import sys, time
from pathlib import Path
from appo.config import load_recipe
from appo.tracking import start_training
folder, algorithm, seed, what = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
tracker = start_training(load_recipe("demo"), folder, algorithm=algorithm, seed=seed, model="warm",
                         manifest_digest="d" * 64)
for step in range(50):
    tracker.log_metrics({"reward": step * 0.5}, step=step)
if what == "end":
    tracker.end()
elif what == "die":
    raise KeyError("the GPU fell off")
else:
    print("waiting", tracker.run_id, flush=True)
    time.sleep(60)
"""


def start(folder: Path, algorithm: str, seed: int, what: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", _CHILD, str(folder), algorithm, str(seed), what]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def test_a_process_that_dies_before_mlflow_is_loaded_does_not_wait(tmp_path: Path) -> None:
    """MLflow cannot be imported while Python shuts down; the events stay in the journal, which the end reaches."""
    died = start(tmp_path, "appo", 0, "die")
    said = died.communicate(timeout=15)[1]  # 20 s, if it waited for what cannot come
    assert "the GPU fell off" in said
    (outcome,) = upload(tmp_path)
    assert runs_of(tmp_path)["appo seed 0"].info.status == "FAILED", outcome


@pytest.mark.slow
def test_several_processes_at_once_on_a_store_that_is_not_there_yet(tmp_path: Path) -> None:
    """Two seeds of one algorithm and another one start together, one dies, one is told to stop, one is
    killed.
    """
    jobs = {
        "appo seed 0": start(tmp_path, "appo", 0, "end"),
        "appo seed 1": start(tmp_path, "appo", 1, "die"),
        "dapo seed 0": start(tmp_path, "dapo", 0, "wait"),
        "grpo seed 0": start(tmp_path, "grpo", 0, "wait"),
    }
    for name in ("dapo seed 0", "grpo seed 0"):
        assert jobs[name].stdout.readline().startswith("waiting")  # type: ignore[union-attr]
    time.sleep(1.5)
    jobs["dapo seed 0"].send_signal(signal.SIGTERM)
    jobs["grpo seed 0"].kill()
    for job in jobs.values():
        job.communicate(timeout=60)
    outcome = upload(tmp_path)
    assert len(outcome) == 4
    runs = runs_of(tmp_path)
    assert {n: r.info.status for n, r in runs.items() if "seed" in n} == {
        "appo seed 0": "FINISHED",
        "appo seed 1": "FAILED",
        "dapo seed 0": "FAILED",
        "grpo seed 0": "FAILED",
    }
    assert "the GPU fell off" in runs["appo seed 1"].data.tags["appo.reason"]
    assert runs["dapo seed 0"].data.tags["appo.reason"] == "terminated (SIGTERM)"
    assert "killed" in runs["grpo seed 0"].data.tags["appo.reason"]
    assert set(runs) == {*jobs, "appo", "dapo", "grpo"}  # one parent for the two seeds of APPO
    for name in jobs:
        assert history(tmp_path, name, "reward") == [(s, s * 0.5) for s in range(50)]
