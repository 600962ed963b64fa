"""A training over several nodes -> a TrainJob of Kubeflow Trainer v2, watched to its end and always cleaned
up.

Used by the step `train_on_nodes`. TrainJobs are made as custom resources with the Kubernetes client, not
through Kubeflow's SDK: the step needs the object itself (its conditions, deletion in the foreground, pods by
label), and the SDK offers neither runtime patches nor a deadline for a job that was built elsewhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from appo.config import Cluster, Recipe
from appo.errors import UserError, ends_in_lines, said_in
from appo.plan import Training

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
RUNTIME = "appo-torch-distributed"
POLL_S = 5.0


class TrainJobFailed(UserError, RuntimeError):
    """The TrainJob ended otherwise than well; the message holds the reason that Kubernetes or the pod
    gave.
    """


@ends_in_lines
def launch(recipe: Recipe, training: Training, step: Mapping[str, Any], *, image: str, run: str) -> None:
    """Run one training as a TrainJob of this pod's namespace, unless it finished before."""
    from kubernetes import config

    config.load_incluster_config()
    namespace = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text().strip()
    name = job_name(run, training)
    job = train_job(name, step, recipe.cluster, image=image, run=run)
    # The job's own deadline counts from its start; waiting for GPUs comes on top.
    run_train_job(job, namespace=namespace, deadline_s=2 * recipe.cluster.deadline_hours * 3600)


def job_name(run: str, training: Training) -> str:
    """A name that a retried step finds again, short enough for the names of its pods."""
    words = re.sub(r"[^a-z0-9]+", "-", training.name.lower())
    return f"appo-{words[:24]}-{hashlib.sha256(f'{run}/{training.name}'.encode()).hexdigest()[:8]}"


def train_job(
    name: str, step: Mapping[str, Any], cluster: Cluster, *, image: str, run: str
) -> dict[str, Any]:
    """The object: what `appo.node` is told, on `cluster.nodes` machines with `cluster.gpus_per_node` GPUs
    each.
    """
    size = {"cpu": str(cluster.cpus), "memory": f"{cluster.memory_gib}Gi"}
    if cluster.gpus_per_node:
        size[cluster.accelerator] = str(cluster.gpus_per_node)
    labels = {"appo.dev/run": run}
    if cluster.queue:
        labels["kueue.x-k8s.io/queue-name"] = cluster.queue
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": RUNTIME},
            "activeDeadlineSeconds": int(cluster.deadline_hours * 3600),
            "trainer": {
                "image": image,
                "numNodes": cluster.nodes,
                "command": ["python3", "-m", "appo.node"],
                "env": _variables(step, image),
                "resourcesPerNode": {"requests": size, "limits": size},
            },
            "runtimePatches": [
                {
                    "manager": "appo.dev/launcher",
                    "trainingRuntimeSpec": {
                        "template": {
                            "spec": {"replicatedJobs": [{"name": "node", "template": _pods(cluster)}]}
                        }
                    },
                }
            ],
        },
    }


def _variables(step: Mapping[str, Any], image: str) -> list[dict[str, str]]:
    """What to do, and what MLflow's tags say about where a run comes from; the exit handler closes runs by
    the latter.
    """
    variables = {"APPO_STEP": json.dumps(dict(step), sort_keys=True), "APPO_IMAGE": image}
    if run_id := os.environ.get("KFP_RUN_ID"):
        variables["KFP_RUN_ID"] = run_id
    return [{"name": name, "value": value} for name, value in variables.items()]


def _pods(cluster: Cluster) -> dict[str, Any]:
    """What the recipe changes about the runtime's pods."""
    pod: dict[str, Any] = {
        "volumes": [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{cluster.shared_memory_gib}Gi"}}
        ],
        "nodeSelector": dict(cluster.node_selector),
        "tolerations": [dict(toleration) for toleration in cluster.tolerations],
        "imagePullSecrets": [{"name": secret} for secret in cluster.image_pull_secrets],
    }
    return {"spec": {"template": {"spec": {key: value for key, value in pod.items() if value}}}}


def run_train_job(job: dict[str, Any], *, namespace: str, deadline_s: float, poll_s: float = POLL_S) -> None:
    """Create `job`, print its first pod's log, wait; delete it in every case, also on SIGTERM.

    Raises TrainJobFailed with the reason, also when `deadline_s` passed (a job that never started has no
    deadline of its own).
    """
    from kubernetes import client

    objects, pods = client.CustomObjectsApi(), client.CoreV1Api()
    name = job["metadata"]["name"]
    where = (GROUP, VERSION, namespace, PLURAL)
    ended = threading.Event()
    with _sigterm_raises():
        try:
            _replace(objects, where, job)
            follower = threading.Thread(
                target=_follow, args=(pods, namespace, name, poll_s, ended), daemon=True
            )
            follower.start()
            end = time.monotonic() + deadline_s
            while time.monotonic() < end:
                status = objects.get_namespaced_custom_object(*where, name).get("status", {})
                conditions = {c["type"]: c for c in status.get("conditions", []) if c["status"] == "True"}
                if conditions.keys() & {"Complete", "Failed"}:
                    ended.set()
                    follower.join(timeout=10 * poll_s)
                if "Complete" in conditions:
                    return
                if "Failed" in conditions:
                    said = conditions["Failed"].get("message") or conditions["Failed"].get("reason")
                    raise TrainJobFailed(f"TrainJob {name}: {said}{_reason(pods, namespace, name)}")
                time.sleep(poll_s)
            raise TrainJobFailed(f"TrainJob {name}: not finished after {deadline_s:.0f} s, deleted")
        finally:
            ended.set()
            _delete(objects, where, name)


def _replace(objects: Any, where: tuple[str, ...], job: dict[str, Any]) -> None:
    """Create the job; one of the same name is left over from an attempt whose pod was killed."""
    from kubernetes.client import ApiException

    for _ in range(60):
        try:
            objects.create_namespaced_custom_object(*where, job)
            return
        except ApiException as error:
            if error.status != 409:
                raise
            _delete(objects, where, job["metadata"]["name"])
            time.sleep(2)
    raise TrainJobFailed(f"TrainJob {job['metadata']['name']}: one of this name does not go away")


def _delete(objects: Any, where: tuple[str, ...], name: str) -> None:
    from kubernetes.client import ApiException

    try:
        objects.delete_namespaced_custom_object(*where, name, propagation_policy="Foreground")
    except ApiException as error:
        if error.status != 404:
            raise


def _first_pod(pods: Any, namespace: str, name: str) -> Any:
    selector = f"jobset.sigs.k8s.io/jobset-name={name},batch.kubernetes.io/job-completion-index=0"
    found = pods.list_namespaced_pod(namespace, label_selector=selector).items
    return max(found, key=lambda pod: pod.metadata.creation_timestamp, default=None)


def _follow(pods: Any, namespace: str, name: str, poll_s: float, ended: threading.Event) -> None:
    """Print the log of each pod that is, in turn, the first one (a replaced pod has a new name)."""
    seen: set[str] = set()
    last = False
    while not last:
        last = ended.is_set()  # one more look after the end
        with contextlib.suppress(Exception):  # logs are for the eye; the conditions decide
            pod = _first_pod(pods, namespace, name)
            if pod is not None and pod.metadata.name not in seen and pod.status.phase != "Pending":
                seen.add(pod.metadata.name)
                answer = pods.read_namespaced_pod_log(
                    pod.metadata.name, namespace, follow=True, _preload_content=False
                )
                for line in answer:
                    print(line.decode("utf-8", "replace").rstrip(), flush=True)
        ended.wait(poll_s)


def _reason(pods: Any, namespace: str, name: str) -> str:
    """How the first pod's container ended, and the mistake that it names, else its last lines; `_follow` shows all."""
    with contextlib.suppress(Exception):  # the pod may be gone; then the condition has to do
        pod = _first_pod(pods, namespace, name)
        ended = pod.status.container_statuses[0].state.terminated
        log = pods.read_namespaced_pod_log(pod.metadata.name, namespace, tail_lines=50).splitlines()
        lines = "\n".join((said_in(log) or [line for line in log if line.strip()][-5:])[:5])
        return f" ({ended.reason}, exit status {ended.exit_code})\n{lines}"
    return ""


@contextlib.contextmanager
def _sigterm_raises() -> Any:
    """Turn a cancelled step into an ordinary exit, so that the job is deleted."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
