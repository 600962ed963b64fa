"""The demo's graph, small and for real: videos, warm start, trainings, vLLM, report, MLflow - and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from appo.config import load_recipe
from tests.tiers import LONG, long

# On a machine that does other things as well; alone it takes about a minute.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
APPO = Path(sys.executable).parent / "appo"
ALGORITHMS = ("grpo", "dapo", "appo") if LONG else ("grpo", "appo")
SMALL = [
    f"algorithms=[{', '.join(ALGORITHMS)}]",
    "training.max_steps=2",
    "training.seeds=[0]",
    "training.prompts_per_step=4",
    "training.save_every=1",
    "model.warm_start.steps=10",
    "data.key_moment.train=16",
    "data.key_moment.easy_train=32",
    "data.key_moment.validation=4",
    "data.key_moment.test=8",
]


def run(folder: Path) -> subprocess.CompletedProcess[str]:
    words = [word for value in SMALL for word in ("--set", value)]
    return subprocess.run(
        [APPO, "pipeline", "run", "--recipe", "demo", "--folder", folder, *words],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    done = run(folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return folder, done.stdout


def summaries(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/train/*/summary.json")}


def test_the_algorithms_are_trained_from_the_same_weights_on_the_same_data(first) -> None:
    folder, _ = first
    made = summaries(folder)
    assert set(made) == {f"{name}-seed0" for name in ALGORITHMS}
    assert len({summary["manifest_digest"] for summary in made.values()}) == 1
    assert all(summary["steps"] == 2 for summary in made.values())
    for name in made:
        assert list(folder.glob(f"*/train/{name}/checkpoint/*.safetensors"))
        lines = next(folder.glob(f"*/train/{name}/metrics.jsonl")).read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_every_checkpoint_and_the_start_are_scored_on_every_test_question(first) -> None:
    folder, _ = first
    scores = {path.parent.name: path for path in folder.glob("*/evaluation-*/*/key_moment.jsonl")}
    assert set(scores) == {"warm_start", *(f"{name}-seed0" for name in ALGORITHMS)}
    lines = [[json.loads(line) for line in path.open()] for path in scores.values()]
    ids = [
        tuple(sorted(line["id"] for line in item if "id" in line)) for item in lines
    ]  # the first is a header
    assert len(set(ids)) == 1
    assert len(ids[0]) == 8


def test_the_screen_ends_with_the_comparison_and_where_to_look(first) -> None:
    _, shown = first
    for words in (*map(str.upper, ALGORITHMS), "samples/s", "report:", "appo ui"):
        assert words in shown
    assert "Traceback" not in shown
    assert "executor_input" not in shown
    assert len(shown.splitlines()) < 120
    report = Path(next(line for line in shown.splitlines() if line.startswith("report:")).split()[1])
    assert report.is_file()
    assert "<svg" in report.read_text() or "<img" in report.read_text()


# What MLflow holds of every step, by algorithm.
CURVES = (
    "reward",
    "rewards/accuracy/mean",
    "rewards/format/mean",
    "entropy",
    "grad_norm",
    "completions/mean_length",
)
CURVES += (
    "completions/clipped_ratio",
    "frac_reward_zero_std",
    "clip_ratio/region_mean",
    "samples_per_second",
)
CURVES += ("tokens_per_second", "phase/rollout_s", "phase/rewards_s", "phase/update_s")
CURVES += ("mfu", "mfu/update", "tokens_per_second_per_device", "tflop_of/attention")
OWN_CURVES = {
    "grpo": ("kl", "phase/scoring_s"),
    "dapo": (),
    "appo": (
        *("appo/crucial_frames", "appo/perception_share", "appo/overlap", "appo/degenerate_share"),
        *("phase/weights_s", "weights/share_1.00", "weights/share_1.63_to_1.70"),
    ),
}
TAGS = ("mlflow.source.git.commit", "appo.recipe_digest", "appo.manifest_digest", "appo.kfp_run_name")


def test_mlflow_holds_parents_and_children(first) -> None:
    folder, _ = first
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("demo")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if run.data.tags.get("appo.role") == "training"]
    parents = {run.info.run_id for run in runs if run.data.tags.get("appo.role") == "parent"}
    assert {run.data.tags["appo.algorithm"] for run in children} == set(ALGORITHMS)
    assert all(run.data.tags["mlflow.parentRunId"] in parents for run in children)
    assert all(run.info.status == "FINISHED" for run in children)
    for run in children:
        for name in (*CURVES, *OWN_CURVES[run.data.tags["appo.algorithm"]]):
            assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [1, 2], name
        assert set(TAGS) <= set(run.data.tags)
    for run in children:  # what a training read and left: its manifest as an input, the data card beside it
        assert run.inputs.dataset_inputs
        kept = {file.path for file in client.list_artifacts(run.info.run_id, "data")}
        assert "data/card.html" in kept


@long
def test_a_pod_of_a_trainjob_trains_on_its_two_processes(first, tmp_path: Path) -> None:
    """The entry of a TrainJob's pod, with torchrun's variables, on CPU processes: one run in MLflow, one summary."""
    from mlflow.tracking import MlflowClient

    folder, _ = first
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = load_recipe("demo", [*SMALL, "training.max_steps=1", f"tracking.uri={store}"])
    step = {
        "recipe": recipe.to_yaml(),
        "storage": str(tmp_path),
        "algorithm": "appo",
        "seed": "0",
        "manifest": str(next(folder.glob("data-*/manifest.jsonl"))),
        "model": str(next(folder.glob("base-*"))),
    }
    machines = {"PET_NNODES": "1", "PET_NODE_RANK": "0", "PET_NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **machines, "APPO_STEP": json.dumps(step)}
    done = subprocess.run(
        [sys.executable, "-m", "appo.node"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert summaries(tmp_path)["appo-seed0"]["steps"] == 1
    client = MlflowClient(store)
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    trainings = [run for run in runs if run.data.tags.get("appo.role") == "training"]
    assert [run.info.status for run in trainings] == ["FINISHED"]


def test_the_same_command_again_only_shows_the_results(first) -> None:
    folder, shown = first
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/train/*/*") if path.is_file()}
    again = run(folder)
    assert again.returncode == 0
    started = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("> ")]
    assert started == ["validate"]  # it looks for new records every time
    assert again.stdout.split("report:")[1] == shown.split("report:")[1]
    assert {path: path.stat().st_mtime_ns for path in before} == before
