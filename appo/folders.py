"""A location (a folder or an `s3://` prefix) -> a folder of this machine, and back.

Steps of a pipeline compute in ordinary folders. Where the storage root is S3, that folder is scratch: what an
earlier step left is fetched before, what this one made is published after, a marker last.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from appo.storage import is_s3

COMPLETE = ".complete"


def local_folder(location: str) -> Path:
    """The folder of this machine that stands for `location`; created. For S3: scratch, the same for the same name.

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

    Raises FileNotFoundError when nothing lies there, and for an S3 prefix whose publishing did not finish.
    """
    if not is_s3(location):
        if not Path(location).is_dir():
            raise FileNotFoundError(
                f"{location}: an earlier step left it there, and it is gone; run that step again"
            )
        return Path(location)
    from appo.objectstore import download_folder

    folder = local_folder(location)
    if not (folder / COMPLETE).is_file():
        download_folder(location, folder)
        if not (folder / COMPLETE).is_file():
            raise FileNotFoundError(
                f"{location}/{COMPLETE}: missing; the step that writes there did not finish"
            )
    return folder


def publish_folder(folder: Path, location: str) -> None:
    """Make what lies in `folder` stand at `location`: nothing to do for a local one; S3 gets the marker last."""
    if not is_s3(location):
        return
    from appo.objectstore import put_bytes, upload_folder

    upload_folder(folder, location)
    put_bytes(f"{location.rstrip('/')}/{COMPLETE}", b"")
    (folder / COMPLETE).touch()
