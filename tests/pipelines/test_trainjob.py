"""A training over several nodes: the TrainJob's form, its end, its reason, its cleaning up (fake_kubernetes.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes import client

from appo.config import Cluster, load_recipe
from appo.plan import Training
from components import trainjob
from tests.pipelines.fake_kubernetes import FakeKubernetes

BIG = Cluster(
    nodes=2,
    gpus_per_node=8,
    memory_gib=900,
    shared_memory_gib=64,
    queue="video",
    node_selector={"pool": "h200"},
    tolerations=({"key": "gpu", "operator": "Exists", "effect": "NoSchedule"},),
    image_pull_secrets=("registry",),
    deadline_hours=3,
)
STEP = {"recipe": "demo", "storage": "s3://appo/runs", "algorithm": "appo", "seed": "0"}


@pytest.fixture
def cluster() -> Iterator[FakeKubernetes]:
    fake = FakeKubernetes()
    configuration = client.Configuration()
    configuration.host = fake.url
    client.Configuration.set_default(configuration)
    yield fake
    fake.stop()


def job(name: str = "appo-appo-seed0-1") -> dict:
    return trainjob.train_job(name, STEP, BIG, image="reg.example/train:1", run="r1")


def run(deadline_s: float = 20) -> None:
    trainjob.run_train_job(job(), namespace="appo", deadline_s=deadline_s, poll_s=0.05)


def test_the_job_asks_for_what_the_recipe_says(monkeypatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "0a1b")
    made = job()["spec"]
    trainer = made["trainer"]
    assert made["runtimeRef"]["name"] == "appo-torch-distributed"
    assert made["activeDeadlineSeconds"] == 3 * 3600
    assert trainer["numNodes"] == 2
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == "8"
    variables = {variable["name"]: variable["value"] for variable in trainer["env"]}
    assert json.loads(variables.pop("APPO_STEP")) == STEP
    # The exit handler finds what a run left open in MLflow by its KFP run, the reader of a report by its image.
    assert variables == {"APPO_IMAGE": "reg.example/train:1", "KFP_RUN_ID": "0a1b"}
    (patch,) = made["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "h200"}
    assert pod["tolerations"][0]["key"] == "gpu"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert pod["volumes"][0]["emptyDir"]["sizeLimit"] == "64Gi"
    assert job()["metadata"]["labels"] == {"appo.dev/run": "r1", "kueue.x-k8s.io/queue-name": "video"}


def test_the_patch_names_what_the_runtime_has() -> None:
    """A patch for a job or a volume that is not in the runtime would do nothing, silently."""
    import yaml

    path = Path(__file__).parents[2] / "k8s" / "components" / "training-runtime" / "runtime.yaml"
    runtime = yaml.safe_load(path.read_text())
    assert runtime["metadata"]["name"] == trainjob.RUNTIME
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["name"] == "node"
    assert "shm" in {volume["name"] for volume in node["template"]["spec"]["template"]["spec"]["volumes"]}


def test_names_are_found_again_by_a_retry_and_apart_for_others() -> None:
    one = trainjob.job_name("run-1", Training("pa_grpo", 0, "a_very-long_variant-of-an-ablation"))
    assert one == trainjob.job_name("run-1", Training("pa_grpo", 0, "a_very-long_variant-of-an-ablation"))
    others = [
        trainjob.job_name("run-2", Training("pa_grpo", 0)),
        trainjob.job_name("run-1", Training("pa_grpo", 1)),
    ]
    assert len({one, *others}) == 3
    assert all(
        len(name) <= 40 and name.replace("-", "").isalnum() and name.islower() for name in (one, *others)
    )


def test_a_finished_job_shows_its_log_and_is_deleted(cluster: FakeKubernetes, capsys) -> None:
    cluster.end("Complete", after_s=0.5)
    run()
    assert "step 1\nstep 2" in capsys.readouterr().out
    assert cluster.deleted == ["appo-appo-seed0-1"]
    assert "jobset-name=appo-appo-seed0-1" in cluster.selector


def test_a_failed_job_hands_over_its_reason(cluster: FakeKubernetes) -> None:
    cluster.terminated = {"reason": "OOMKilled", "exitCode": 137}
    cluster.log = b"torch.OutOfMemoryError: CUDA out of memory\n"
    cluster.end("Failed", "jobset failed", after_s=0.2)
    with pytest.raises(
        trainjob.TrainJobFailed, match=r"jobset failed \(OOMKilled, exit status 137\)\s.*out of memory"
    ):
        run()
    assert cluster.deleted == ["appo-appo-seed0-1"]


def test_a_job_that_never_starts_does_not_wait_for_ever(cluster: FakeKubernetes) -> None:
    with pytest.raises(trainjob.TrainJobFailed, match="not finished after 1 s"):
        run(deadline_s=1)
    assert cluster.deleted == ["appo-appo-seed0-1"]


def test_a_job_left_over_from_a_killed_attempt_is_replaced(cluster: FakeKubernetes) -> None:
    cluster.jobs["appo-appo-seed0-1"] = {"metadata": {"name": "appo-appo-seed0-1"}}
    cluster.end("Complete", after_s=3)
    run()
    assert len(cluster.made) == 1
    assert cluster.deleted == ["appo-appo-seed0-1"] * 2


def test_cancelling_the_step_deletes_the_job(cluster: FakeKubernetes) -> None:
    code = (
        "import json, sys; from kubernetes import client; from components import trainjob;"
        "c = client.Configuration(); c.host = sys.argv[1]; client.Configuration.set_default(c);"
        "trainjob.run_train_job(json.loads(sys.argv[2]), namespace='appo', deadline_s=60, poll_s=0.1)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", code, cluster.url, json.dumps(job())], env=environment)
    end = time.monotonic() + 20
    while not cluster.jobs and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=20) == 128 + 15
    assert cluster.deleted == ["appo-appo-seed0-1"]


def test_the_launcher_takes_no_gpu_and_the_job_takes_them_all(tmp_path: Path) -> None:
    import yaml

    from pipelines.compile import compile_pipeline

    path = tmp_path / "made.yaml"
    compile_pipeline("compare_policies", path, overrides=["cluster.nodes=2", "cluster.gpus_per_node=8"])
    pipeline = next(yaml.safe_load_all(path.read_text()))
    executors = pipeline["deploymentSpec"]["executors"]
    assert "exec-train" not in executors
    assert "accelerator" not in executors["exec-train-on-nodes"]["container"]["resources"]
    assert load_recipe("demo").cluster.nodes == 1  # the default graph trains in its own pod
