"""A location (a folder or an `s3://` prefix) -> a folder of this machine, and back.

Steps of a pipeline compute in ordinary folders. Where the storage root is S3, that folder is scratch: what an
earlier step left is fetched before, what this one made is published after, a marker last. A training's
folder is mirrored while it grows, so that a pod that is preempted loses only the steps since its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from types import TracebackType

from appo.errors import UserError
from appo.storage import StorageError, fetch, is_s3

COMPLETE = ".complete"
CHECKPOINT_MARKER = "COMPLETE"  # written last into each checkpoint folder by the training
log = logging.getLogger("appo.folders")


class FolderMissing(UserError, FileNotFoundError):
    """What an earlier step was to leave is not there, or not whole; the message names the place."""


def local_folder(location: str) -> Path:
    """The folder of this machine that stands for `location`; created. For S3: scratch, one for each name.

    APPO_SCRATCH names where scratch folders lie (a pod's volume); default: the system's temporary folder.
    """
    if not is_s3(location):
        folder = Path(location)
    else:
        scratch = Path(os.environ.get("APPO_SCRATCH") or Path(tempfile.gettempdir()) / "appo")
        name = hashlib.sha256(location.encode()).hexdigest()[:12]
        folder = scratch / f"{location.rstrip('/').rsplit('/', 1)[-1]}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_folder(location: str) -> Path:
    """A folder of this machine with everything that lies at `location`.

    Raises FolderMissing when nothing lies there, and for an S3 prefix whose publishing did not finish.
    """
    if not is_s3(location):
        if not Path(location).is_dir():
            raise FolderMissing(f"{location}: left there by an earlier step, and gone; run that step again")
        return Path(location)
    folder = local_folder(location)
    if not (folder / COMPLETE).is_file():
        names = _names(location)
        if not is_published(location, names):
            raise FolderMissing(
                f"{location}: holds no {COMPLETE}, which is written last, so it is not complete; "
                "run the step that writes there again"
            )
        _download(location, folder, (name for name in names if name != COMPLETE))
        (folder / COMPLETE).touch()
    return folder


def is_published(location: str, names: Collection[str]) -> bool:
    """Whether the upload of an `s3://` prefix with these names ended: by its own marker, or that of the folder that it
    is a part of, such as the checkpoint in a training's.
    """
    if COMPLETE in names:
        return True
    above = location.rstrip("/").rpartition("/")[0]
    return above.count("/") > 2 and COMPLETE in _names(above)


def publish_folder(folder: Path, location: str) -> None:
    """Make what lies in `folder` stand at `location`: nothing to do for a local one; S3 gets the marker
    last.
    """
    if is_s3(location):
        _upload(folder, location, _files(folder))
        (folder / COMPLETE).touch()
        _upload(folder, location, [folder / COMPLETE])


class Mirror:
    """Keeps an S3 prefix in step with a training's folder while it runs; does nothing for a local location.

    On entering, fetches the newest whole checkpoint and what was recorded beside it, so that a new pod
    continues. A failed upload is tried again at the next interval and once more at the end, where it is an
    error.
    """

    def __init__(self, folder: Path, location: str, *, interval_s: float = 20.0) -> None:
        self._folder, self._location, self._interval_s = folder, location, interval_s
        self._sent: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        if is_s3(self._location):
            self._restore()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_s3(self._location):
            self._stop.set()
            self._thread.join()
            self.push()

    def _restore(self) -> None:
        names = _names(self._location)
        whole = [
            n.split("/")[1]
            for n in names
            if n.startswith("checkpoints/") and n.endswith(f"/{CHECKPOINT_MARKER}")
        ]
        newest = max(whole, key=lambda name: int(name.rsplit("-", 1)[1]), default=None)
        wanted = [n for n in names if not n.startswith("checkpoints/") or n.split("/")[1] == newest]
        _download(self._location, self._folder, (n for n in wanted if not (self._folder / n).exists()))

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.push()
            except StorageError as error:  # the network may be back at the next interval
                log.warning("mirror: %s", error)

    def push(self) -> None:
        """Upload what is new: whole checkpoints with their marker last, and the files that grow."""
        folders = [p.parent for p in (self._folder / "checkpoints").glob(f"*/{CHECKPOINT_MARKER}")]
        growing = [p for p in _files(self._folder) if "checkpoints" not in p.relative_to(self._folder).parts]
        for group in [*(_files(folder, last=CHECKPOINT_MARKER) for folder in sorted(folders)), growing]:
            for path in group:
                try:
                    stamp = path.stat().st_mtime
                    if self._sent.get(str(path)) != stamp:
                        _upload(self._folder, self._location, [path])
                        self._sent[str(path)] = stamp
                except FileNotFoundError:  # an old checkpoint that the training removed meanwhile
                    break


def _files(folder: Path, last: str = "") -> list[Path]:
    """Every file below `folder` in order of name, one of them last; temporary ones left out."""
    found = (
        p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp") and p.name != COMPLETE
    )
    return sorted(found, key=lambda path: (path.name == last, path))


def _names(location: str) -> list[str]:
    from appo.objectstore import list_objects

    return [name for name, _ in list_objects(location)]


def _upload(folder: Path, location: str, paths: Iterable[Path]) -> None:
    from appo.objectstore import put_file

    for path in paths:
        put_file(f"{location.rstrip('/')}/{path.relative_to(folder).as_posix()}", path)


def _download(location: str, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        fetch(f"{location.rstrip('/')}/{name}", folder / name)
