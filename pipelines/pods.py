"""What each kind of step asks Kubernetes for: the only place where GPUs, memory and scheduling are set.

The local runner ignores all of it, but for retries.
"""

from __future__ import annotations

from kfp import dsl, kubernetes

from appo.config import Cluster

# From the ConfigMap appo-settings and the Secrets (k8s/base/settings.yaml, docs/runbook.md) into the
# environment.
SETTINGS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "APPO_SCRATCH")
SECRETS = {
    "appo-s3": {"access-key": "AWS_ACCESS_KEY_ID", "secret-key": "AWS_SECRET_ACCESS_KEY"},
    "appo-mlflow": {"username": "MLFLOW_TRACKING_USERNAME", "password": "MLFLOW_TRACKING_PASSWORD"},
}
USER = 1000
# The annotation of each pod that names its image, registry and tag included.
IMAGE = "appo.dev/image"


def light(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step without a GPU: checks, assembly, reports."""
    task.set_cpu_request("1").set_cpu_limit("4").set_memory_request("2Gi").set_memory_limit("16Gi")
    _common(task)
    return task


def always(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step that looks at the world (is there new data?): never taken from the cache."""
    task.set_caching_options(False)
    return task


def for_training(task: dsl.PipelineTask, cluster: Cluster) -> dsl.PipelineTask:
    """A pod with the recipe's GPUs; retried, because it resumes from its checkpoints.

    Not taken from Kubeflow's cache unless asked: a scheduled training with equal parameters would train
    nothing, and a hit whose files are gone breaks the next step. The training itself is not repeated where
    it finished.
    """
    _heavy(task, cluster)
    task.set_caching_options(cluster.local)
    if cluster.retries and not cluster.local:
        task.set_retry(num_retries=cluster.retries, backoff_duration="60s", backoff_factor=2.0)
    kubernetes.set_timeout(task, int(cluster.deadline_hours * 3600))
    return task


def as_launcher(task: dsl.PipelineTask, cluster: Cluster) -> dsl.PipelineTask:
    """A small pod that watches a TrainJob; the job holds the GPUs. Waits for them up to as long as it may
    run.
    """
    light(task)
    if cluster.retries and not cluster.local:
        task.set_retry(num_retries=cluster.retries, backoff_duration="60s", backoff_factor=2.0)
    kubernetes.set_timeout(task, int(2 * cluster.deadline_hours * 3600) + 600)
    return task


def for_evaluation(task: dsl.PipelineTask, cluster: Cluster) -> dsl.PipelineTask:
    """The same pod: one engine serves every checkpoint in turn."""
    return for_training(task, cluster)


def _common(task: dsl.PipelineTask) -> None:
    kubernetes.use_config_map_as_env(task, "appo-settings", {key: key for key in SETTINGS}, optional=True)
    for name, keys in SECRETS.items():
        kubernetes.use_secret_as_env(task, name, keys, optional=True)
    # Kubeflow labels every pod with its run; MLflow's runs carry it as a tag.
    kubernetes.use_field_path_as_env(task, "KFP_RUN_ID", "metadata.labels['pipeline/runid']")
    # MLflow's runs carry the image as well. By way of the pod's metadata: a plain variable would also be set by
    # the local runner, which uses no image. The revision stands in the image itself (docker/Dockerfile).
    kubernetes.add_pod_annotation(task, IMAGE, task.container_spec.image)
    kubernetes.use_field_path_as_env(task, "APPO_IMAGE", f"metadata.annotations['{IMAGE}']")
    kubernetes.set_security_context(task, run_as_user=USER, run_as_group=USER, run_as_non_root=True)
    kubernetes.empty_dir_mount(task, "scratch", "/scratch")


def _heavy(task: dsl.PipelineTask, cluster: Cluster) -> None:
    _common(task)
    task.set_cpu_request(str(cluster.cpus)).set_cpu_limit(str(cluster.cpus))
    task.set_memory_request(f"{cluster.memory_gib}Gi").set_memory_limit(f"{cluster.memory_gib}Gi")
    if cluster.gpus_per_node:
        task.set_accelerator_type(cluster.accelerator).set_accelerator_limit(cluster.gpus_per_node)
    for key, value in cluster.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in cluster.tolerations:
        kubernetes.add_toleration(task, **toleration)
    if cluster.queue:
        kubernetes.add_pod_label(task, "kueue.x-k8s.io/queue-name", cluster.queue)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(cluster.image_pull_secrets))
    # PyTorch's data loaders and NCCL fail in the 64 MiB of /dev/shm that a container gets otherwise.
    kubernetes.empty_dir_mount(
        task, "shm", "/dev/shm", medium="Memory", size_limit=f"{cluster.shared_memory_gib}Gi"
    )
