"""A graph on this machine: the replacements in kfp, resuming, failing, stopping. Small real steps, no
model.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.console import Story
from pipelines.local import PipelineFailed, StepFailed, run_graph

GRAPH = textwrap.dedent(
    """
    from typing import Dict, List
    from kfp import dsl

    @dsl.component(base_image="python", install_kfp_package=False)
    def plan_trainings(folder: str) -> List[Dict[str, str]]:
        with open(folder + "/planned", "a") as file:
            file.write("x")
        return [{"algorithm": a, "seed": s} for s in ("0", "1") for a in ("grpo", "appo")]

    @dsl.component(base_image="python", install_kfp_package=False)
    def train(folder: str, algorithm: str, seed: str, policy: dsl.Output[dsl.Model]):
        import os, pathlib, sys, time
        place = pathlib.Path(folder)
        (place / f"start-{algorithm}-{seed}").write_text(os.environ["OMP_NUM_THREADS"])
        print("training", algorithm, seed, "in", os.environ["KFP_RUN_NAME"])
        print("noise", file=sys.stderr)
        time.sleep(float(os.environ.get("STEP_S", "0.2")))
        if algorithm == "appo" and seed == "0" and (place / "break").exists():
            raise ValueError("a planned failure")
        if algorithm == "appo" and seed == "0" and (place / "mistake").exists():
            from appo.errors import UserError, ends_in_lines

            @ends_in_lines
            def step():
                raise UserError("model.path=x: a planned mistake; name another")

            print("a bar that is not ended\\r", end="", file=sys.stderr, flush=True)
            step()
        with open(place / f"trained-{algorithm}-{seed}", "a") as file:
            file.write("x")
        policy.metadata["location"] = f"{algorithm}-{seed}"
        pathlib.Path(policy.path).write_text("weights")

    @dsl.component(base_image="python", install_kfp_package=False)
    def evaluate(folder: str, policies: dsl.Input[List[dsl.Model]]):
        import pathlib
        pathlib.Path(folder, "evaluated").write_text(" ".join(p.metadata["location"] for p in policies))

    @dsl.pipeline(name="small")
    def graph(folder: str):
        trainings = plan_trainings(folder=folder)
        with dsl.ParallelFor(items=trainings.output, parallelism=2) as item:
            policy = train(folder=folder, algorithm=item.algorithm, seed=item.seed)
        evaluate(folder=folder, policies=dsl.Collected(policy.outputs["policy"]))
    """
)


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """KFP reads a component's source, so the graph is a real module."""
    (tmp_path / "small_graph.py").write_text(GRAPH)
    monkeypatch.syspath_prepend(str(tmp_path))
    import small_graph

    yield small_graph.graph
    sys.modules.pop("small_graph")


def run(graph, tmp_path: Path) -> str:
    screen = io.StringIO()
    try:
        with Story(Console(file=screen, width=120)) as story:
            run_graph(graph, {"folder": str(tmp_path)}, folder=tmp_path / "run", story=story)
    finally:
        print(screen.getvalue())
    return screen.getvalue()


def test_every_step_runs_once_and_the_same_command_again_repeats_nothing(graph, tmp_path: Path) -> None:
    shown = run(graph, tmp_path)
    assert (tmp_path / "evaluated").read_text() == "grpo-0 appo-0 grpo-1 appo-1"
    (name,) = {path.name for path in (tmp_path / "run" / "kfp").iterdir()} - {"cache"}
    assert f"training grpo 0 in {name}" in shown  # MLflow's runs carry it as a tag
    assert "noise" not in shown
    assert "noise" in (tmp_path / "run" / "logs" / "grpo-seed-0.log").read_text()
    assert "executor_input" not in shown

    again = run(graph, tmp_path)
    assert again.count("finished before, kept") == 6
    assert all(path.read_text() == "x" for path in tmp_path.glob("trained-*"))
    assert (tmp_path / "planned").read_text() == "x"


def test_trainings_share_the_cores(graph, tmp_path: Path) -> None:
    run(graph, tmp_path)
    cores = len(os.sched_getaffinity(0))
    assert {p.read_text() for p in tmp_path.glob("start-*")} == {str(max(1, cores // 2))}


def test_a_failed_step_leaves_the_others_usable_and_is_all_that_is_repeated(graph, tmp_path: Path) -> None:
    (tmp_path / "break").touch()
    with pytest.raises(StepFailed, match="appo seed 0 failed") as failed:
        run(graph, tmp_path)
    assert failed.value.status == 1  # a defect, whose traceback the story has shown
    assert not (tmp_path / "evaluated").exists()
    done = {path.name for path in tmp_path.glob("trained-*")}
    assert done == {"trained-grpo-0", "trained-grpo-1", "trained-appo-1"}

    (tmp_path / "break").unlink()
    shown = run(graph, tmp_path)
    assert shown.count("finished before, kept") == 4
    assert (tmp_path / "evaluated").read_text() == "grpo-0 appo-0 grpo-1 appo-1"
    assert all(path.read_text() == "x" for path in tmp_path.glob("trained-*"))


def test_a_mistake_in_a_step_is_told_in_its_lines(graph, tmp_path: Path, capsys) -> None:
    (tmp_path / "mistake").touch()
    with pytest.raises(PipelineFailed) as failed:
        run(graph, tmp_path)
    assert (type(failed.value), failed.value.status) == (PipelineFailed, 2)
    assert str(failed.value).splitlines() == [
        "appo seed 0 failed; fix the reason and give the same command again",
        "model.path=x: a planned mistake; name another",
    ]
    shown = capsys.readouterr().out
    assert "error: model.path=x: a planned mistake" in shown
    assert "Traceback" not in shown
    assert "Traceback" not in (tmp_path / "run" / "logs" / "appo-seed-0.log").read_text()


def test_a_stopped_pipeline_stops_its_steps(graph, tmp_path: Path) -> None:
    """SIGTERM to the command reaches steps in processes of their own, and nothing more is started."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import small_graph;"
        "from pipelines.console import Story; from pipelines.local import run_graph;"
        "folder = Path(sys.argv[1]);"
        "run_graph(small_graph.graph, {'folder': str(folder)}, folder=folder / 'run', story=Story())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "STEP_S": "30", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("start-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode != 0
    assert not list(tmp_path.glob("trained-*"))
    assert len(list(tmp_path.glob("start-*"))) == 2
