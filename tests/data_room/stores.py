"""A real S3 server for the tests (SeaweedFS), and a proxy in front of it that breaks things on demand."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

IDENTITIES = {
    "identities": [
        {
            "name": "full",
            "credentials": [{"accessKey": "full", "secretKey": "full-secret"}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": "reader", "secretKey": "reader-secret"}],
            "actions": ["Read:public", "List:public"],
        },
    ]
}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on; SeaweedFS adds 10,000 to each for gRPC, so they are taken from low ground.

    At random: several test runs on one machine must not all try the same ones.
    """
    found: list[int] = []
    while len(found) < count:
        candidate = random.SystemRandom().randrange(11000, 22000)
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", candidate))
                two.bind(("127.0.0.1", candidate + 10000))
            except OSError:
                continue
        found.append(candidate)
    return found


class Weed:
    """`weed server` with the S3 gateway, on free loopback ports, in a folder of its own."""

    def __init__(self, folder: Path):
        self._folder, self._config = folder, folder / "s3.json"
        self._config.write_text(json.dumps(IDENTITIES))
        self._log = open(folder / "weed.log", "wb")  # noqa: SIM115 - closed in stop()
        self._start()

    def _start(self) -> None:
        master, volume, filer, self.port = free_ports(4)
        self._process = subprocess.Popen(
            [
                str(Path(sys.executable).with_name("weed")), "server", f"-dir={self._folder}", "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}",
                f"-filer.port={filer}", "-volume.max=100", "-master.volumeSizeLimitMB=64", "-s3",
                f"-s3.port={self.port}", f"-s3.config={self._config}", "-s3.iam=false",
                # Their default ports are fixed: two servers at a time would meet there.
                "-s3.port.iceberg=0", "-s3.port.lance=0",
            ],
            stdout=self._log,
            stderr=self._log,
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self, timeout_s: float = 60.0) -> None:
        """Until a bucket can be made and an object written: the gateway answers before the volumes do."""
        import boto3
        from botocore.config import Config

        end, starts, reason = time.monotonic() + timeout_s, 1, ""
        while time.monotonic() < end:
            if self._process.poll() is not None:  # someone took a port between our look and its bind
                assert starts < 4, f"weed exited with {self._process.returncode}; see {self._log.name}"
                starts += 1
                self._start()
            client = boto3.client(
                "s3",
                endpoint_url=self.url,
                aws_access_key_id="full",
                aws_secret_access_key="full-secret",
                region_name="us-east-1",
                config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
            )
            try:
                for bucket in ("data", "public"):
                    # Made by an attempt before, whose object the volumes were not ready for.
                    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                        client.create_bucket(Bucket=bucket)
                client.put_object(Bucket="data", Key="ready", Body=b"1")
            except Exception as error:
                reason = str(error)
                time.sleep(0.3)
            else:
                return
        raise AssertionError(f"SeaweedFS is not ready after {timeout_s} s: {reason}")

    def stop(self) -> None:
        self._process.kill()  # it takes half a minute to stop politely, and its folder is thrown away
        self._process.wait()
        self._log.close()


@dataclass
class Fault:
    """What the proxy does to the requests that `when` picks, `times` times."""

    kind: str  # "error500", "reset", "corrupt", "slow"
    when: Callable[[str, str], bool]
    times: int
    after_bytes: int = 1000
    hits: int = field(default=0)


class FaultyProxy:
    """Forwards to the store byte for byte (with the Host header, which is signed), save for faults."""

    def __init__(self, upstream_port: int):
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str]] = []  # method, path, Range
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.requests.append((self.command, self.path, self.headers.get("Range", "")))
                fault = proxy._fault(self.command, self.path)
                if fault is not None and fault.kind == "error500":
                    self.send_response(503)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=30)
                upstream.request(self.command, self.path, body, dict(self.headers))
                answer = upstream.getresponse()
                data = answer.read()
                upstream.close()
                if fault is not None and fault.kind == "corrupt" and data:
                    at = len(data) // 2
                    data = data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]
                self.send_response(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                if fault is not None and fault.kind in ("reset", "slow"):
                    self.wfile.write(data[: fault.after_bytes])
                    self.wfile.flush()
                    if fault.kind == "slow":
                        time.sleep(3)
                    # SO_LINGER 0: close with RST, as a broken network does
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    os.close(self.connection.detach())
                    return
                self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = handle_any

            def log_message(self, *args: object) -> None:
                return None

            def handle(self) -> None:
                try:
                    super().handle()
                except (ConnectionError, OSError, ValueError):
                    return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.hits < fault.times and fault.when(method, path):
                fault.hits += 1
                return fault
        return None

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
