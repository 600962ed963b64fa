"""A pipeline's end -> no run of it left open in MLflow, whatever happened to its pods.

A pod that was killed without a last word leaves a journal without an end. This sends what it still holds and
closes the run as failed, with the reason. Only journals of the given pipeline run are touched.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from appo.errors import ends_in_lines


@ends_in_lines
def close_runs(storage: str) -> dict[str, str]:
    """Close what this pipeline run (KFP_RUN_ID) left open below `storage`. Returns journal name -> outcome."""
    from appo.tracking.stored import upload_stored

    return upload_stored(
        storage,
        uri=os.environ.get("MLFLOW_TRACKING_URI"),
        only=lambda folder: any(_of_this_run(path) for path in folder.glob("*.jsonl")),
    )


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
