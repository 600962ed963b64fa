"""A real MLflow server that goes away and comes back, or never does."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from appo.config import Recipe, load_recipe
from appo.tracking import sender, start_training
from appo.tracking.sender import upload
from appo.tracking.tracker import open_sink


def begin(recipe: Recipe, folder: Path) -> Any:
    return start_training(recipe, folder, algorithm="dapo", seed=0, model="warm", manifest_digest="d" * 64)


def curve(uri: str, run_id: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    return [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(run_id, "reward")]


@pytest.mark.slow
def test_server_away_for_a_while_nothing_lost_nothing_doubled(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sender, "_LONGEST_PAUSE_S", 1.0)
    recipe = load_recipe("demo", [f"tracking.uri={server.uri}"])
    tracker = begin(recipe, tmp_path / "run")
    run_id = None
    for _ in range(8):  # two busy cores take their time to import mlflow
        run_id = run_id or tracker.run_id
    assert run_id is not None
    for step in range(10):
        tracker.log_metrics({"reward": float(step)}, step=step)
    server.stop()
    began = time.perf_counter()
    for step in range(10, 40):
        tracker.log_metrics({"reward": float(step)}, step=step)
        time.sleep(0.05)
    # 30 steps of .05 s: logging itself must add next to nothing while the server is away
    assert time.perf_counter() - began < 4.0
    server.start()
    for step in range(40, 50):
        tracker.log_metrics({"reward": float(step)}, step=step)
    tracker.end(timeout_s=120)
    assert tracker.complaints == []
    assert curve(server.uri, run_id) == [(s, float(s)) for s in range(50)]
    assert caplog.text.count("cannot be reached") == 1
    from mlflow import MlflowClient

    assert MlflowClient(server.uri).get_run(run_id).info.status == "FINISHED"


def test_what_is_said_about_an_unreachable_server_holds_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:hunter2@127.0.0.1:9")
    with caplog.at_level(logging.DEBUG):
        tracker = begin(load_recipe("demo"), tmp_path)
        tracker.log_metrics({"reward": 1.0}, step=1)
        assert tracker.run_id is None  # waits until it is known that nobody answers
        tracker.end(timeout_s=0.1)
    said = "".join(r.getMessage() for r in caplog.records if r.name.startswith("appo"))
    assert "cannot be reached" in said
    assert "hunter2" not in said
    assert all(b"hunter2" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.slow
def test_server_never_reachable_the_numbers_are_in_a_file_and_one_command_uploads_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = load_recipe("demo", ["tracking.uri=http://127.0.0.1:9"])  # discard: nothing listens there
    tracker = begin(nobody, tmp_path)
    for step in range(5):
        tracker.log_metrics({"reward": float(step)}, step=step)
    with caplog.at_level(logging.WARNING):
        tracker.end(timeout_s=0.5)
    assert f"appo tracking upload {tmp_path / 'tracking'}" in caplog.text
    elsewhere = open_sink(load_recipe("demo"), tmp_path)
    for _ in range(2):  # a second upload finds nothing to do
        upload(tmp_path / "tracking", uri=elsewhere.uri)
    runs = elsewhere.find("appo.role", "training")
    assert [run.info.status for run in runs] == ["FINISHED"]
    assert curve(elsewhere.uri, runs[0].info.run_id) == [(s, float(s)) for s in range(5)]
