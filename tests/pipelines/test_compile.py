"""Compiled pipelines: the same bytes for the same input, equal to the golden files, small components."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from appo.policy import algorithms
from pipelines import catalog
from pipelines.compile import compile_pipeline

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).parents[2]
COMPONENT_LINES = 40


def spec(path: Path) -> tuple[dict, dict]:
    pipeline, platform = yaml.safe_load_all(path.read_text())
    return pipeline, platform


@pytest.mark.parametrize("name", catalog.NAMES)
def test_compiled_pipeline_equals_its_golden_file(name: str, tmp_path: Path) -> None:
    compile_pipeline(name, tmp_path / "made.yaml")
    assert (tmp_path / "made.yaml").read_bytes() == (GOLDEN / f"{name}.yaml").read_bytes(), (
        "if the change is meant: make golden, and read the difference"
    )


def test_hash_seed_does_not_change_the_yaml(tmp_path: Path) -> None:
    """Sets and dictionaries iterate in another order in another process; the YAML must not."""
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-m", "pipelines.compile", str(tmp_path / seed)]
        subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    for name in catalog.NAMES:
        one, other = (tmp_path / seed / f"{name}.yaml" for seed in ("1", "2"))
        assert one.read_bytes() == other.read_bytes()


def test_images_and_pods_follow_the_settings(tmp_path: Path) -> None:
    overrides = (
        "cluster.gpus_per_node=4",
        "cluster.queue=video",
        "cluster.node_selector={pool: h200}",
        "cluster.tolerations=[{key: gpu, operator: Exists, effect: NoSchedule}]",
        "cluster.image_pull_secrets=[registry]",
        "cluster.shared_memory_gib=32",
        "cluster.deadline_hours=2",
    )
    code = (
        "from pathlib import Path; from pipelines.compile import compile_pipeline as c; import sys;"
        "c('compare_policies', Path(sys.argv[1]), overrides=sys.argv[2:], images='reg.example/a', tag='9')"
    )
    path = tmp_path / "made.yaml"
    subprocess.run([sys.executable, "-c", code, str(path), *overrides], cwd=REPOSITORY, check=True)
    pipeline, platform = spec(path)
    train = pipeline["deploymentSpec"]["executors"]["exec-train"]["container"]
    assert train["image"] == "reg.example/a/train-python3.11:9"
    assert train["resources"]["accelerator"]["resourceCount"] == "4"
    light = pipeline["deploymentSpec"]["executors"]["exec-assemble"]["container"]
    assert "accelerator" not in light["resources"]
    pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-train"]
    assert pod["activeDeadlineSeconds"] == "7200"
    assert pod["emptyDirMounts"][1] == {
        "medium": "Memory",
        "mountPath": "/dev/shm",
        "sizeLimit": "32Gi",
        "volumeName": "shm",
    }
    assert pod["nodeSelector"]["labels"] == {"pool": "h200"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert pod["podMetadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "video"}
    # Which image a run came from: into the pod's metadata, from there into the variable that MLflow's tags read.
    assert pod["podMetadata"]["annotations"] == {"appo.dev/image": train["image"]}
    fields = {field["name"]: field["fieldPath"] for field in pod["fieldPathAsEnv"]}
    assert fields["APPO_IMAGE"] == "metadata.annotations['appo.dev/image']"
    assert pod["imagePullSecret"][0]["secretName"] == "registry"


@pytest.mark.parametrize("name", catalog.NAMES)
def test_shared_features_are_filled_on_one_gpu_before_any_training(name: str, tmp_path: Path) -> None:
    place = "training.feature_cache_dir=s3://appo/features"
    compile_pipeline(name, tmp_path / "made.yaml", overrides=(place, "cluster.gpus_per_node=4"))
    pipeline, _ = spec(tmp_path / "made.yaml")
    container = pipeline["deploymentSpec"]["executors"]["exec-features"]["container"]
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    (tasks,) = (
        dag["tasks"]
        for c in pipeline["components"].values()
        if "features" in (dag := c.get("dag", {})).get("tasks", {})
    )
    assert "base-model" in tasks["features"]["dependentTasks"]
    (loop,) = (task for key, task in tasks.items() if key.startswith("for-loop"))
    assert "features" in loop["dependentTasks"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("training.feature_cache_dir=/gone/with/the/pod",),
        ("training.feature_cache_dir=s3://a/b", "model.freeze_vision=false"),
    ],
)
def test_without_a_shared_place_no_step_fills_it(overrides: tuple[str, ...], tmp_path: Path) -> None:
    compile_pipeline("compare_policies", tmp_path / "made.yaml", overrides=overrides)
    assert "exec-features" not in (tmp_path / "made.yaml").read_text()


def test_nothing_takes_a_gpu_before_the_recipe_is_checked() -> None:
    for name in catalog.NAMES:
        pipeline, _ = spec(GOLDEN / f"{name}.yaml")
        assert set(pipeline["root"]["dag"]["tasks"]) == {"exit-handler-1", "close"}
        tasks = pipeline["components"]["comp-exit-handler-1"]["dag"]["tasks"]

        def before(task: str, tasks: dict = tasks) -> set[str]:
            direct = tasks[task].get("dependentTasks", [])
            return {task, *direct, *(name for other in direct for name in before(other))}

        assert not tasks["validate"].get("dependentTasks")
        assert all("validate" in before(task) for task in tasks)


@pytest.mark.parametrize("name", catalog.NAMES)
def test_the_server_can_read_what_was_compiled(name: str) -> None:
    """The server parses the YAML into this message and refuses unknown fields; so does ParseDict."""
    pipeline, platform = spec(GOLDEN / f"{name}.yaml")
    json_format.ParseDict(pipeline, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())


def test_parameters_are_described_and_the_algorithm_is_a_choice() -> None:
    for name in catalog.NAMES:
        pipeline, _ = spec(GOLDEN / f"{name}.yaml")
        assert all(p.get("description") for p in pipeline["root"]["inputDefinitions"]["parameters"].values())
    pipeline, _ = spec(GOLDEN / "train_and_evaluate.yaml")
    algorithm = pipeline["root"]["inputDefinitions"]["parameters"]["algorithm"]
    assert set(algorithm["literals"]) == set(algorithms())


@pytest.mark.parametrize("path", sorted((REPOSITORY / "components").glob("*.py")), ids=lambda path: path.name)
def test_components_stay_small(path: Path) -> None:
    import ast

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < COMPONENT_LINES
