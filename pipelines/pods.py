"""What each kind of step asks Kubernetes for: the only place where GPUs, memory and scheduling are set.

The local runner ignores all of it, but for retries.
"""

from __future__ import annotations

from kfp import dsl, kubernetes

from appo.config import Cluster


def light(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """A step without a GPU: checks, assembly, reports."""
    task.set_cpu_request("1").set_cpu_limit("4").set_memory_request("2Gi").set_memory_limit("16Gi")
    return task


def for_training(task: dsl.PipelineTask, cluster: Cluster) -> dsl.PipelineTask:
    """A pod with the recipe's GPUs; retried, because it resumes from its checkpoints."""
    _heavy(task, cluster)
    if cluster.retries:
        task.set_retry(num_retries=cluster.retries, backoff_duration="60s", backoff_factor=2.0)
    kubernetes.set_timeout(task, int(cluster.deadline_hours * 3600))
    return task


def for_evaluation(task: dsl.PipelineTask, cluster: Cluster) -> dsl.PipelineTask:
    """The same pod: one engine serves every checkpoint in turn."""
    return for_training(task, cluster)


def _heavy(task: dsl.PipelineTask, cluster: Cluster) -> None:
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
