"""A stand-in for the Kubernetes API as far as a TrainJob's launcher uses it; no container runs.

A real one needs a cluster with Kubeflow Trainer. Jobs are checked against Trainer's own models when they arrive.
"""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from tests.k8s.test_manifests import strict

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/appo/trainjobs"
PODS = "/api/v1/namespaces/appo/pods"


class FakeKubernetes:
    """conditions: what the next job's status will say. made, deleted: what was asked. lingering: conflicts first."""

    def __init__(self) -> None:
        self.conditions: list[dict[str, str]] = []
        self.made: list[dict[str, Any]] = []
        self.deleted: list[str] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log = b"step 1\nstep 2\n"
        self.terminated: dict[str, Any] | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, body: Any) -> None:
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body["metadata"]["name"]
                if name in fake.jobs:
                    self.answer(409, {"kind": "Status", "reason": "AlreadyExists"})
                    return
                strict(TrainerV1alpha1TrainJob, body)
                fake.made.append(body)
                fake.jobs[name] = body
                self.answer(201, body)

            def do_DELETE(self) -> None:
                name = urlparse(self.path).path.rsplit("/", 1)[1]
                found = fake.jobs.pop(name, None)
                if found is not None:
                    fake.deleted.append(name)
                self.answer(200 if found else 404, {"kind": "Status"})

            def do_GET(self) -> None:
                url = urlparse(self.path)
                if url.path.startswith(JOBS):
                    name = url.path.rsplit("/", 1)[1]
                    job = fake.jobs.get(name)
                    status = {"status": {"conditions": fake.conditions}}
                    self.answer(200 if job else 404, {**(job or {}), **status})
                elif re.fullmatch(rf"{PODS}/[\w-]+/log", url.path):
                    self.answer(200, fake.log)
                elif url.path == PODS:
                    fake.selector = parse_qs(url.query)["labelSelector"][0]
                    self.answer(200, {"kind": "PodList", "items": [fake.pod()] if fake.jobs else []})
                else:
                    self.answer(404, {})

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def pod(self) -> dict[str, Any]:
        state = {"terminated": self.terminated} if self.terminated else {"running": {}}
        status = {
            "name": "node",
            "image": "i",
            "imageID": "i",
            "ready": True,
            "restartCount": 0,
            "state": state,
        }
        return {
            "metadata": {"name": "node-0-0", "creationTimestamp": "2026-01-01T00:00:00Z"},
            "status": {"phase": "Running", "containerStatuses": [status]},
        }

    def end(self, kind: str, message: str = "", *, after_s: float = 0.0) -> None:
        """The job's status from `after_s` on."""
        said = {"type": kind, "status": "True", "reason": "Jobs", "message": message}

        def say() -> None:
            time.sleep(after_s)
            self.conditions = [said]

        threading.Thread(target=say, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
