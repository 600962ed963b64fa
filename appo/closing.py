"""A pipeline's end -> no run of it left open in MLflow, whatever happened to its pods.

A pod that was killed without a last word leaves a journal without an end. This sends what it still holds and
closes the run as failed, with the reason. Only journals of the given pipeline run are touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from appo.folders import local_folder
from appo.storage import fetch, is_s3


def close_runs(storage: str) -> dict[str, str]:
    """Close what this pipeline run (KFP_RUN_ID) left open below `storage`. Returns journal name -> outcome."""
    from appo.tracking.sender import upload

    outcomes: dict[str, str] = {}
    for folder in _journals(storage):
        if any(_of_this_run(path) for path in folder.glob("*.jsonl")):
            outcomes |= upload(folder, uri=os.environ.get("MLFLOW_TRACKING_URI"))
            _put_back(folder, storage)
    return outcomes


def _journals(storage: str) -> Iterator[Path]:
    """Folders of journals below `storage`, fetched where that is S3."""
    if not is_s3(storage):
        yield from sorted(Path(storage).glob("*/train/*/tracking"))
        return
    from appo.objectstore import list_objects

    names = [name for name, _ in list_objects(storage) if "/tracking/" in name]
    for name in names:
        fetch(f"{storage.rstrip('/')}/{name}", local_folder(storage) / name)
    yield from sorted({(local_folder(storage) / name).parent for name in names})


def _of_this_run(path: Path) -> bool:
    run = os.environ.get("KFP_RUN_ID")
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed pod did not finish
            continue
        if event.get("op") == "start" and event.get("tags", {}).get("appo.kfp_run_id") == run:
            return True
    return False


def _put_back(folder: Path, storage: str) -> None:
    """What was sent is noted in the journal; a retried pod must not send it again."""
    if is_s3(storage):
        from appo.objectstore import put_file

        for path in sorted(folder.iterdir()):
            if path.is_file():
                name = path.relative_to(local_folder(storage)).as_posix()
                put_file(f"{storage.rstrip('/')}/{name}", path)
