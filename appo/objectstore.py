"""`s3://bucket/key` -> bytes, through boto3: ranged reads, checksummed uploads, one policy of retries.

Works with AWS and with stores that speak its protocol (`AWS_ENDPOINT_URL`). Credentials are boto3's own
business: environment, profile, pod identity. Reads that break off in mid-object go on where they stopped, and
never mix two versions of an object (If-Match). Uploads carry their SHA-256 and are compared with what the
store holds; an object appears only when it is complete.
"""

from __future__ import annotations

import base64
import hashlib
import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from appo.errors import one_line
from appo.storage import StorageError, StoreError

T = TypeVar("T")
ATTEMPTS = 6
MISMATCHES = 3  # of a checksum, before the stored object is blamed
BACKOFF_S, BACKOFF_LIMIT_S = 0.2, 10.0  # doubled each time, with jitter: about 6 s over all attempts
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 45
FIRST_ANSWER_S = (
    25.0  # an address from which nothing came for so long is taken for wrong, and not tried again
)
PIECE_BYTES = 1 << 16  # what a broken connection can lose
READ_AHEAD = 1 << 20  # a seek into an archive fetches at least this much
PART_BYTES = 16 << 20  # of a multipart upload; S3 allows 10,000 parts, so objects up to 160 GB
OUR_SHA256 = "appo-sha256"  # metadata key
_TRANSIENT = {"500", "502", "503", "504", "InternalError", "SlowDown", "ServiceUnavailable", "RequestTimeout"}


# Whether the store has answered this process at all, if only to refuse.
_answered = threading.Event()


class _Mismatch(Exception):
    """Bytes arrived that are not those that were stored."""


def split_uri(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> ("bucket", "a/b"). Raises StorageError for anything else."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise StorageError(f"{uri}: write it as s3://bucket/key")
    return bucket, key


@lru_cache(maxsize=1)
def client() -> Any:
    """The process's S3 client. Its own retries are off: they end at the first byte of a body."""
    import boto3
    from botocore.config import Config

    config = Config(
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=READ_TIMEOUT_S,
        retries={"total_max_attempts": 1},
        max_pool_connections=16,
        s3={"addressing_style": "path"},
        # Stores other than AWS refuse the newer trailing checksums; MD5 and our own SHA-256 are sent instead.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    # A session of its own: boto3's default one keeps the first credentials it finds for the life of the
    # process.
    return boto3.session.Session().client("s3", config=config)


def open_object(uri: str) -> BinaryIO:
    """A seekable stream; only what is read is fetched. Raises StorageError when there is no such object."""
    return io.BufferedReader(_ObjectReader(uri), READ_AHEAD)


def list_objects(prefix: str) -> Iterator[tuple[str, str]]:
    """(key below `prefix`, stamp that changes with the contents) of every object, in order of key."""
    bucket, key = split_uri(prefix)
    folder = key.rstrip("/") + "/" if key else ""
    token: dict[str, str] = {}
    while True:
        request = {"Bucket": bucket, "Prefix": folder, **token}
        page = _retry(prefix, partial(client().list_objects_v2, **request))
        for item in page.get("Contents", ()):
            if name := item["Key"].removeprefix(folder):
                yield name, f"{item['Size']}-{_etag(item)}"
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def put_bytes(uri: str, data: bytes) -> None:
    """Upload `data`; the object is there whole or not at all, and its size and checksum are compared
    afterwards.
    """
    _upload(uri, io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())


def put_file(uri: str, path: Path) -> None:
    """`put_bytes` for a file of any size, a part at a time."""
    from appo.storage import sha256_file

    with open(path, "rb") as file:
        _upload(uri, file, path.stat().st_size, sha256_file(path))


def download(uri: str, file: BinaryIO) -> None:
    """Write the whole object into `file`, verified. On a mismatch `file` is rewound and the object read
    again.
    """
    head = _head(uri)
    start = file.tell()

    def whole() -> None:
        file.seek(start)
        file.truncate()
        check = _Checksums()
        for piece in _pieces(uri, 0, int(head["ContentLength"]), head["ETag"]):
            check.update(piece)
            file.write(piece)
        check.compare(head)

    _retry(uri, whole)


def _upload(uri: str, stream: BinaryIO, size: int, sha256: str) -> None:
    bucket, key = split_uri(uri)
    if not key:
        raise StorageError(f"{uri}: names a bucket; add the object's key")
    where = {"Bucket": bucket, "Key": key}
    metadata = {OUR_SHA256: sha256}
    if size <= PART_BYTES:
        body = stream.read()
        digests = [hashlib.md5(body, usedforsecurity=False).digest()]
        request = {**where, "Body": body, "Metadata": metadata, "ContentMD5": _b64(digests[0])}
        _retry(uri, partial(client().put_object, **request))
    else:
        digests = _upload_parts(uri, stream, where, metadata)
    _compare_upload(uri, size, sha256, digests, multipart=size > PART_BYTES)


def _upload_parts(uri: str, stream: BinaryIO, where: dict[str, str], metadata: dict[str, str]) -> list[bytes]:
    start = partial(client().create_multipart_upload, **where, Metadata=metadata)
    here = {**where, "UploadId": _retry(uri, start)["UploadId"]}
    digests: list[bytes] = []
    parts: list[dict[str, Any]] = []
    try:
        while body := stream.read(PART_BYTES):
            number, digest = len(parts) + 1, hashlib.md5(body, usedforsecurity=False).digest()
            request = {**here, "PartNumber": number, "ContentMD5": _b64(digest), "Body": body}
            answer = _retry(uri, partial(client().upload_part, **request))
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
            digests.append(digest)
        _retry(uri, partial(client().complete_multipart_upload, **here, MultipartUpload={"Parts": parts}))
    except BaseException:
        # Parts of an upload that is not completed cost storage for ever.
        _retry(uri, partial(client().abort_multipart_upload, **here))
        raise
    return digests


def _compare_upload(uri: str, size: int, sha256: str, digests: list[bytes], *, multipart: bool) -> None:
    """What the store says it holds against what was sent."""
    head = _head(uri)
    joined = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    expected = f"{joined}-{len(digests)}" if multipart else digests[0].hex()
    etag = _etag(head)
    # With KMS encryption an ETag is no MD5; the store checked the Content-MD5 of each request all the same.
    comparable = not _kms(head) and _is_md5(etag, multipart)
    if head["ContentLength"] != size or (comparable and etag != expected):
        raise StorageError(f"{uri}: the store holds other bytes than were sent; upload again")
    if head.get("Metadata", {}).get(OUR_SHA256) != sha256:
        raise StorageError(f"{uri}: was overwritten during the upload; give each run its own prefix")


def _kms(head: dict[str, Any]) -> bool:
    return str(head.get("ServerSideEncryption", "")).startswith("aws:kms")


def _etag(answer: dict[str, Any]) -> str:
    return str(answer["ETag"]).strip('"')


def _is_md5(etag: str, multipart: bool) -> bool:
    digest, _, parts = etag.partition("-")
    return len(digest) == 32 and bool(parts) == multipart


def _head(uri: str) -> dict[str, Any]:
    bucket, key = split_uri(uri)
    head: dict[str, Any] = _retry(uri, lambda: client().head_object(Bucket=bucket, Key=key))
    return head


class _ObjectReader(io.RawIOBase):
    """Ranged GETs behind the interface of a file."""

    def __init__(self, uri: str):
        self._uri, self._at = uri, 0
        self._head = _head(uri)
        self._size = int(self._head["ContentLength"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._size, self._at + len(buffer))
        data = b"".join(_pieces(self._uri, self._at, end, self._head["ETag"]))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        if self._at:
            data = b"".join(_pieces(self._uri, self._at, self._size, self._head["ETag"]))
        else:
            whole = io.BytesIO()
            download(self._uri, whole)
            data = whole.getvalue()
        self._at += len(data)
        return data


class _Checksums:
    """Of a whole object as it arrives."""

    def __init__(self) -> None:
        self._sha256, self._md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)

    def update(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self._md5.update(piece)

    def compare(self, head: dict[str, Any]) -> None:
        ours, etag = head.get("Metadata", {}).get(OUR_SHA256), _etag(head)
        if ours is not None:
            if ours != self._sha256.hexdigest():
                raise _Mismatch
        elif _is_md5(etag, False) and not _kms(head) and etag != self._md5.hexdigest():
            raise _Mismatch


def _pieces(uri: str, start: int, end: int, etag: str) -> Iterator[bytes]:
    """The bytes [start, end) of one version of an object, going on after each interruption."""
    bucket, key = split_uri(uri)
    failures = 0
    while start < end:
        request = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{end - 1}", "IfMatch": etag}
        answer = _retry(uri, partial(client().get_object, **request))
        try:
            while start < end and (piece := answer["Body"].read(min(PIECE_BYTES, end - start))):
                start += len(piece)
                failures = 0
                yield piece
            if start < end:
                raise ConnectionError("the body ended early")
        except _broken_reads() as error:
            failures += 1
            if failures >= ATTEMPTS:
                raise StoreError(f"{uri}: broke off {failures} times at byte {start}: {error}") from error
            _pause(failures)
        finally:
            answer["Body"].close()


def _broken_reads() -> tuple[type[BaseException], ...]:
    from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError
    from urllib3.exceptions import HTTPError

    ours = (ConnectionError, TimeoutError)
    return (*ours, HTTPClientError, IncompleteReadError, ResponseStreamingError, HTTPError)


def _retry(uri: str, call: Callable[[], T]) -> T:
    """`call()`, again after server errors and broken connections.

    Raises StorageError for a missing or damaged object, StoreError for everything else.
    """
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

    started = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            result = call()
            _answered.set()
            return result
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(
                f"{uri}: no complete S3 credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_PROFILE, or give the pod's service account a role"
            ) from error
        except ClientError as error:
            _answered.set()
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
            if attempt == ATTEMPTS or not _TRANSIENT & {code, status}:
                kind = StorageError if _missing(code, status) else StoreError
                raise kind(f"{uri}: {_in_words(code, status, attempt)}") from error
        except (*_broken_reads(), BotoCoreError) as error:
            silent = not _answered.is_set() and time.monotonic() - started > FIRST_ANSWER_S
            if attempt == ATTEMPTS or silent:
                raise StoreError(
                    f"{uri}: not reached in {attempt} attempts: {one_line(error)}; see AWS_ENDPOINT_URL and the network"
                ) from error
        except _Mismatch as error:
            if attempt == MISMATCHES:
                raise StorageError(f"{uri}: does not match its checksum; store it again") from error
        _pause(attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _missing(code: str, status: str) -> bool:
    return code in ("NoSuchKey", "404") or (status == "404" and code != "NoSuchBucket")


def _in_words(code: str, status: str, attempts: int) -> str:
    if _missing(code, status):
        return "no such object"
    if code == "NoSuchBucket":
        return "no such bucket"
    if code == "PreconditionFailed" or status == "412":
        return "was replaced while it was being read; start again"
    if status == "403":
        return (
            f"access denied ({code}): these credentials may not do this here; ask for a policy that allows it"
        )
    return f"the store answers {code} (HTTP {status})" + (
        f" after {attempts} attempts" if attempts > 1 else ""
    )


def _pause(failures: int) -> None:
    """Exponential back-off with full jitter, so that many workers do not come back at once."""
    time.sleep(random.uniform(0.5, 1.0) * min(BACKOFF_LIMIT_S, BACKOFF_S * 2 ** (failures - 1)))


def _b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
