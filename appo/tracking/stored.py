"""Journals below a storage root (a folder or an `s3://` prefix) -> MLflow, and what was sent noted in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from appo.folders import local_folder
from appo.storage import fetch, is_s3
from appo.tracking.sender import upload


def upload_stored(
    storage: str, *, uri: str | None = None, only: Callable[[Path], bool] = lambda folder: True
) -> dict[str, str]:
    """Send what every journal below `storage` still holds; see `sender.upload`. Returns journal name -> outcome.

    only: which folders of journals; journals of S3 are fetched first and put back with what was sent noted, so
    that a retried pod does not send it again.
    """
    outcomes: dict[str, str] = {}
    for folder in _folders(storage):
        if only(folder):
            outcomes |= upload(folder, uri=uri)
            _put_back(folder, storage)
    return outcomes


def _folders(storage: str) -> Iterator[Path]:
    if not is_s3(storage):
        yield from sorted({path.parent for path in Path(storage).rglob("tracking/*.jsonl")})
        return
    from appo.objectstore import list_objects

    local = local_folder(storage)
    names = [name for name, _ in list_objects(storage) if "tracking" in Path(name).parts[:-1]]
    for name in names:
        fetch(f"{storage.rstrip('/')}/{name}", local / name)
    yield from sorted({(local / name).parent for name in names})


def _put_back(folder: Path, storage: str) -> None:
    if is_s3(storage):
        from appo.objectstore import put_file

        for path in sorted(folder.iterdir()):
            if path.is_file():
                name = path.relative_to(local_folder(storage)).as_posix()
                put_file(f"{storage.rstrip('/')}/{name}", path)
