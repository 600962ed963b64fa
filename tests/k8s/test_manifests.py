"""Every overlay builds, is valid to the letter, and keeps the promises about rights, limits and secrets."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1ClusterTrainingRuntime

K8S = Path(__file__).parents[2] / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
KUBERNETES = "1.32"
CUSTOM = {"ClusterTrainingRuntime": TrainerV1alpha1ClusterTrainingRuntime}
CLUSTER_SCOPED = {"Namespace", "ClusterTrainingRuntime"}

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl builds the overlays and is not on this machine"
)


@cache
def built(overlay: str) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def name(item: dict[str, Any]) -> str:
    return f"{item['kind']}/{item['metadata']['name']}"


def pods(items: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(owner, pod template) of everything that makes pods."""
    for item in items:
        if item["kind"] in ("Deployment", "StatefulSet"):
            yield name(item), item["spec"]["template"]
        if item["kind"] == "ClusterTrainingRuntime":
            for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
                yield name(item), job["template"]["spec"]["template"]


def containers(template: dict[str, Any]) -> list[dict[str, Any]]:
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def strict(model: type, values: dict[str, Any]) -> None:
    """The generated models drop unknown keys without a word: what comes out must be what went in."""
    back = model.from_dict(values).to_dict()
    assert without_empty(back) == without_empty(values)


def without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in (None, {}, [])}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid_to_the_letter(overlay: str) -> None:
    items = built(overlay)
    assert len(items) > 15
    for item in items:
        if item["kind"] in CUSTOM:
            strict(CUSTOM[item["kind"]], item)
        else:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_objects_are_named_once_and_stand_in_the_namespace(overlay: str) -> None:
    items = built(overlay)
    names = [name(item) for item in items]
    assert len(set(names)) == len(names)
    for item in items:
        if item["kind"] not in CLUSTER_SCOPED:
            assert item["metadata"].get("namespace") == "appo", name(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_locked_down(overlay: str) -> None:
    for owner, template in pods(built(overlay)):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, owner
        assert security["seccompProfile"]["type"] == "RuntimeDefault", owner
        assert template["spec"]["automountServiceAccountToken"] is False, owner
        assert template["spec"]["serviceAccountName"] != "default", owner
        for container in containers(template):
            where = f"{owner} {container['name']}"
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            for kind in ("requests", "limits"):
                assert {"cpu", "memory", "ephemeral-storage"} <= set(container["resources"][kind]), where
            image, _, tag = container["image"].rpartition(":")
            assert image, where
            assert tag not in ("", "latest"), where


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_servers_are_probed(overlay: str) -> None:
    for item in built(overlay):
        if item["kind"] in ("Deployment", "StatefulSet"):
            for container in item["spec"]["template"]["spec"]["containers"]:
                assert {"readinessProbe", "livenessProbe"} <= set(container), name(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_secret_is_written_down(overlay: str) -> None:
    for item in built(overlay):
        assert item["kind"] != "Secret"
    for owner, template in pods(built(overlay)):
        for container in containers(template):
            for variable in container.get("env", []):
                if any(word in variable["name"] for word in ("PASSWORD", "SECRET", "ACCESS_KEY")):
                    assert "secretKeyRef" in variable.get("valueFrom", {}), f"{owner} {variable['name']}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_references_lead_somewhere(overlay: str) -> None:
    """Accounts, claims, settings and the pods that services, budgets and policies select."""
    items = built(overlay)
    names = {name(item) for item in items}
    labels = [template["metadata"]["labels"] for _, template in pods(items)]
    for owner, template in pods(items):
        assert f"ServiceAccount/{template['spec']['serviceAccountName']}" in names, owner
        for volume in template["spec"].get("volumes", []):
            if claim := volume.get("persistentVolumeClaim"):
                assert f"PersistentVolumeClaim/{claim['claimName']}" in names, owner
            if config := volume.get("configMap"):
                assert f"ConfigMap/{config['name']}" in names, owner
    for item in items:
        if item["kind"] in ("Service", "PodDisruptionBudget"):
            selector = item["spec"]["selector"]
            wanted = selector.get("matchLabels", selector).items()
            assert any(wanted <= found.items() for found in labels), name(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_traffic_is_denied_by_default_and_every_server_says_who_may_come(overlay: str) -> None:
    items = built(overlay)
    policies = {item["metadata"]["name"]: item["spec"] for item in items if item["kind"] == "NetworkPolicy"}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for item in items:
        if item["kind"] in ("Deployment", "StatefulSet"):
            found = item["spec"]["template"]["metadata"]["labels"].items()
            selecting = [
                policy
                for policy in policies.values()
                if (match := policy["podSelector"].get("matchLabels")) and match.items() <= found
            ]
            assert any(policy.get("ingress") for policy in selecting), name(item)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_launcher_may_ask_the_cluster_and_only_for_trainjobs(overlay: str) -> None:
    items = built(overlay)
    assert not [name(item) for item in items if item["kind"] in ("ClusterRole", "ClusterRoleBinding")]
    (role,) = [item for item in items if item["kind"] == "Role"]
    writing = {
        (group, resource)
        for rule in role["rules"]
        if set(rule["verbs"]) - {"get", "list", "watch"}
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert writing == {("trainer.kubeflow.org", "trainjobs")}
    (binding,) = [item for item in items if item["kind"] == "RoleBinding"]
    assert [subject["name"] for subject in binding["subjects"]] == ["appo-launcher"]


def test_validation_catches_a_misspelt_key() -> None:
    """The check itself: without it every test above could pass on anything."""
    deployment = next(item for item in built(OVERLAYS[0]) if item["kind"] == "Deployment")
    broken = {**deployment, "spec": {**deployment["spec"], "replica": 1}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)
    runtime = next(item for item in built(OVERLAYS[0]) if item["kind"] == "ClusterTrainingRuntime")
    with pytest.raises(AssertionError):
        strict(CUSTOM["ClusterTrainingRuntime"], {**runtime, "spec": {**runtime["spec"], "nodes": 1}})
