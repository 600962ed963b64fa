"""A stand-in for the model hub, which cannot be reached here: the part of its protocol that its own client speaks.

Commits of one repository are folders; branches and tags name them and can be moved. Every request is kept.
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class Hub:
    """`with Hub("org/name", {commit: folder}, {"main": commit}) as hub:` answers at `hub.address`."""

    def __init__(self, repo: str, commits: dict[str, Path], references: dict[str, str]):
        self.repo, self.commits, self.references = repo, commits, references
        self.requests: list[str] = []
        self.gated = False

    def __enter__(self) -> Hub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def looked_up(self) -> list[str]:
        """The questions which commit a name means."""
        return [path for path in self.requests if path.startswith("/api/models/") and "/tree/" not in path]

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(request.path.partition("?")[0])
        self.requests.append(path)
        found, headers, status = self._found(path)
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(found))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(found)

    def _found(self, path: str) -> tuple[bytes, dict[str, str], int]:
        parts = path.removeprefix("/api/models").removeprefix(f"/{self.repo}").strip("/").split("/")
        if self.repo not in path:
            return _refused("RepoNotFound", 401)
        if self.gated:
            return _refused("GatedRepo", 403)
        revision = parts[1] if len(parts) > 1 else "main"
        commit = self._commit(revision)
        if commit is None:
            return _refused("RevisionNotFound", 404)
        folder = self.commits[commit]
        if parts[0] == "resolve":
            data = (folder / "/".join(parts[2:])).read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            return data, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, 200
        files = sorted(p for p in folder.iterdir() if p.is_file())
        if parts[0] == "tree":
            listed = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.name.encode()).hexdigest(),
                }
                for p in files
            ]
            return _json(listed)
        return _json(
            {"id": self.repo, "sha": commit, "siblings": [{"rfilename": p.name} for p in files], "tags": []}
        )

    def _commit(self, revision: str) -> str | None:
        known = self.references.get(revision, revision)
        found = [commit for commit in self.commits if len(known) >= 7 and commit.startswith(known)]
        return found[0] if len(found) == 1 else None


def _json(value: object) -> tuple[bytes, dict[str, str], int]:
    return json.dumps(value).encode(), {"Content-Type": "application/json"}, 200


def _refused(code: str, status: int) -> tuple[bytes, dict[str, str], int]:
    return b"", {"X-Error-Code": code, "X-Error-Message": code}, status
