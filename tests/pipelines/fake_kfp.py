"""A stand-in for Kubeflow Pipelines' REST API: it remembers, checks nothing about scheduling, runs nothing.

A real server needs a cluster. Paths and field names are those of the generated client (kfp_server_api), so a
misspelt field or a wrong path fails here as it would there.
"""

from __future__ import annotations

import json
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

BASE = "/apis/v2beta1"
PAGE = 2  # small, so that lists have several pages


class FakeKfp:
    """Starts on a free loopback port; `url`, `runs`, `schedules`, `log` (method and path of each request)."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.schedules: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, str] = {}
        self.log: list[str] = []
        self.tokens: list[str | None] = []
        self.refuse: str | None = None
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def handle_all(self) -> None:
                url = urlparse(self.path)
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else {}
                fake.log.append(f"{self.command} {url.path}")
                fake.tokens.append(self.headers.get("authorization"))
                if fake.refuse and fake.refuse in url.path and self.command == "POST":
                    status, answer = 400, {"error": "Invalid input error: refused for the test"}
                else:
                    status, answer = fake.answer(self.command, url.path, parse_qs(url.query), body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = handle_all

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def answer(self, method: str, path: str, query: dict, body: dict) -> tuple[int, dict[str, Any]]:
        match method, path.removeprefix(BASE).strip("/").split("/"):
            case "GET", ["healthz"]:
                return 200, {"multi_user": True}
            case "GET", ["experiments"]:
                return 200, {"experiments": [self._experiment(name) for name in self.experiments]}
            case "POST", ["experiments"]:
                self.experiments.setdefault(body["display_name"], str(uuid.uuid4()))
                return 200, self._experiment(body["display_name"])
            case "POST", ["runs"]:
                self.runs.append({"run_id": str(uuid.uuid4()), **body})
                return 200, self.runs[-1]
            case "POST", ["recurringruns"]:
                made = {"recurring_run_id": str(uuid.uuid4()), "status": "ENABLED", **body}
                self.schedules[made["recurring_run_id"]] = made
                return 200, made
            case "GET", ["recurringruns"]:
                start = int(query.get("page_token", ["0"])[0] or 0)
                found = list(self.schedules.values())
                more = str(start + PAGE) if start + PAGE < len(found) else ""
                return 200, {"recurringRuns": found[start : start + PAGE], "next_page_token": more}
            case "DELETE", ["recurringruns", number]:
                del self.schedules[number]
                return 200, {}
        return 404, {"error": f"{method} {path}: not known to this stand-in"}

    def _experiment(self, name: str) -> dict[str, Any]:
        return {"experiment_id": self.experiments[name], "display_name": name, "namespace": "appo"}
