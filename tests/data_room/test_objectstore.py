"""S3 through a real server (SeaweedFS): what is written is read back, whatever breaks on the way."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from appo import objectstore, storage
from appo.data.archives import list_entries, read_entry
from appo.storage import StorageError
from tests.data_room.stores import Fault, FaultyProxy

pytestmark = pytest.mark.slow


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def get(path: str):
    return lambda method, url: method == "GET" and path in url


def test_small_object_round_trip(s3: FaultyProxy) -> None:
    storage.write("s3://data/small.bin", b"hello")
    assert storage.read_bytes("s3://data/small.bin") == b"hello"
    storage.write("s3://data/small.bin", "grüße")
    assert storage.read_bytes("s3://data/small.bin").decode() == "grüße"


def test_multipart_upload_and_download(
    s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "PART_BYTES", 5 << 20)  # S3's smallest part
    data = noise(12 << 20)
    (tmp_path / "big").write_bytes(data)
    objectstore.put_file("s3://data/deep/big file ü.bin", tmp_path / "big")
    assert sum(method == "PUT" and "partNumber" in path for method, path, _ in s3.requests) == 3
    copy = storage.fetch("s3://data/deep/big file ü.bin", tmp_path / "copy")
    assert copy.read_bytes() == data
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "copy"]


def test_listing_follows_pages_and_is_ordered(s3: FaultyProxy) -> None:
    names = [f"list/{index:03d}.txt" for index in range(25)]
    for name in names:
        objectstore.put_bytes(f"s3://data/{name}", name.encode())
    found = dict(objectstore.list_objects("s3://data/list"))
    assert list(found) == [name.removeprefix("list/") for name in names]
    stamps = found["003.txt"]
    objectstore.put_bytes("s3://data/list/003.txt", b"list/other")  # as many bytes
    assert dict(objectstore.list_objects("s3://data/list"))["003.txt"] != stamps


def test_server_errors_are_retried(s3: FaultyProxy) -> None:
    s3.faults.append(Fault("error500", lambda method, path: True, times=3))
    storage.write("s3://data/retry.bin", b"persistent")
    s3.faults.append(Fault("error500", lambda method, path: True, times=3))
    assert storage.read_bytes("s3://data/retry.bin") == b"persistent"
    assert all(fault.hits == 3 for fault in s3.faults)


def test_server_that_stays_down_is_named(s3: FaultyProxy) -> None:
    s3.faults.append(Fault("error500", lambda method, path: True, times=10**6))
    with pytest.raises(StorageError, match=r"s3://data/x.*HTTP 503.*6 attempts"):
        storage.write("s3://data/x", b"1")


def test_reset_in_mid_object_goes_on_where_it_stopped(s3: FaultyProxy) -> None:
    data = noise(300_000)
    storage.write("s3://data/reset.bin", data)
    s3.faults.append(Fault("reset", get("reset.bin"), times=2, after_bytes=100_000))
    s3.requests.clear()
    assert storage.read_bytes("s3://data/reset.bin") == data
    ranges = [span for method, path, span in s3.requests if method == "GET" and "reset.bin" in path]
    assert ranges[0] == "bytes=0-299999"
    assert len(ranges) == 3
    # Only what was missing is asked for again.
    assert int(ranges[1].removeprefix("bytes=").split("-")[0]) > 0


def test_slow_read_times_out_and_is_retried(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectstore, "READ_TIMEOUT_S", 1)
    objectstore.client.cache_clear()
    data = noise(200_000)
    storage.write("s3://data/slow.bin", data)
    s3.faults.append(Fault("slow", get("slow.bin"), times=1, after_bytes=50_000))
    assert storage.read_bytes("s3://data/slow.bin") == data


def test_corrupted_download_is_noticed_and_read_again(s3: FaultyProxy, tmp_path: Path) -> None:
    data = noise(50_000)
    storage.write("s3://data/corrupt.bin", data)
    s3.faults.append(Fault("corrupt", get("corrupt.bin"), times=1))
    assert storage.read_bytes("s3://data/corrupt.bin") == data
    s3.faults.append(Fault("corrupt", get("corrupt.bin"), times=10**6))
    with pytest.raises(StorageError, match="does not match its checksum"):
        storage.fetch("s3://data/corrupt.bin", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []  # nothing half-written, not even under a temporary name


def test_objects_of_others_are_verified_by_their_etag(s3: FaultyProxy) -> None:
    objectstore.client().put_object(Bucket="data", Key="theirs", Body=b"x" * 1000)
    s3.faults.append(Fault("corrupt", get("theirs"), times=10**6))
    with pytest.raises(StorageError, match="does not match its checksum"):
        storage.read_bytes("s3://data/theirs")


def test_upload_with_wrong_bytes_is_refused(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that changes between digest and wire (bad memory, bad proxy) must not become an object."""
    real = objectstore._b64
    monkeypatch.setattr(objectstore, "_b64", lambda digest: real(hashlib.md5(b"other").digest()))
    with pytest.raises(StorageError, match=r"BadDigest|other bytes"):
        storage.write("s3://data/wrong.bin", b"right")


def test_interrupted_upload_leaves_nothing(
    s3: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objectstore, "PART_BYTES", 5 << 20)
    (tmp_path / "big").write_bytes(noise(11 << 20))
    s3.faults.append(Fault("error500", lambda method, path: "partNumber=2" in path, times=10**6))
    with pytest.raises(StorageError, match="HTTP 503"):
        objectstore.put_file("s3://data/half.bin", tmp_path / "big")
    with pytest.raises(StorageError, match="no such object"):
        storage.read_bytes("s3://data/half.bin")
    uploads = objectstore.client().list_multipart_uploads(Bucket="data").get("Uploads", [])
    assert [u for u in uploads if u["Key"] == "half.bin"] == []


def test_missing_credentials(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    objectstore.client.cache_clear()
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        storage.read_bytes("s3://data/small.bin")


def test_bucket_without_permission(s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write("s3://public/open.txt", b"open")
    storage.write("s3://data/secret.txt", b"secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "reader-secret")
    objectstore.client.cache_clear()
    assert storage.read_bytes("s3://public/open.txt") == b"open"
    with pytest.raises(StorageError, match=r"s3://data/secret\.txt: access denied"):
        storage.read_bytes("s3://data/secret.txt")
    with pytest.raises(StorageError, match="access denied"):
        storage.write("s3://public/mine.txt", b"no")


def test_missing_object_and_bucket(s3: FaultyProxy) -> None:
    with pytest.raises(StorageError, match="s3://data/nothing: no such object"):
        storage.read_bytes("s3://data/nothing")
    with pytest.raises(StorageError, match="no such"):
        storage.read_bytes("s3://nobucket/nothing")
    with pytest.raises(StorageError, match="s3://bucket/key"):
        objectstore.split_uri("s3:///key")


def test_zip_is_read_in_place_by_ranges(s3: FaultyProxy) -> None:
    """One entry of a 20 MB archive costs its directory and its bytes, not the archive."""
    members = {f"videos/{index:02d}.mp4": noise(1 << 20, seed=index) for index in range(20)}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index, (name, data) in enumerate(members.items()):
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED)
    objectstore.put_bytes("s3://data/source.zip", packed.getvalue())
    s3.requests.clear()
    entries = {entry.name: entry for entry in list_entries("s3://data/source.zip")}
    assert set(entries) == set(members)
    for name in ("videos/07.mp4", "videos/12.mp4"):
        assert read_entry(entries[name]) == members[name]
    fetched = 0
    for method, _, span in s3.requests:
        if method == "GET":
            start, end = span.removeprefix("bytes=").split("-")
            fetched += int(end) - int(start) + 1
    # Directory: one read-ahead; each entry: its bytes and at most two read-aheads around them.
    assert fetched <= (2 << 20) + 5 * objectstore.READ_AHEAD


def test_reader_seeks_like_a_file(s3: FaultyProxy) -> None:
    data = noise(3 << 20)
    storage.write("s3://data/seek.bin", data)
    rng = np.random.default_rng(1)
    with storage.open_binary("s3://data/seek.bin") as ours, io.BytesIO(data) as reference:
        for _ in range(20):
            offset, count = int(rng.integers(0, 3 << 20)), int(rng.integers(0, 70_000))
            assert ours.seek(offset) == reference.seek(offset)
            assert ours.read(count) == reference.read(count)
        assert ours.seek(-10, os.SEEK_END) == reference.seek(-10, os.SEEK_END)
        assert ours.read() == reference.read()


def test_object_replaced_during_reading_is_noticed(s3: FaultyProxy) -> None:
    storage.write("s3://data/changing.bin", noise(3 << 20, seed=1))
    with storage.open_binary("s3://data/changing.bin") as stream:
        stream.read(10)
        storage.write("s3://data/changing.bin", noise(3 << 20, seed=2))
        stream.seek(2 << 20)
        with pytest.raises(StorageError, match="replaced while"):
            stream.read(10)
