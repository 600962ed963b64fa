"""The two steps that a retraining adds: is there new data, and is the challenger better than the champion.

Beside `appo.steps`, and called by components in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from appo import plan
from appo.config import Recipe
from appo.errors import ends_in_lines
from appo.folders import fetch_folder, local_folder
from appo.handover import Done, Place, file_of, numbers


@ends_in_lines
def gate(recipe: Recipe, storage: str, *, manifest: str) -> Done:
    """Whether a retraining has anything to learn, and the champion (location "" without one)."""
    from appo.data.manifest import read_manifest
    from appo.reports.promotion import gate as find_gate

    found = find_gate(recipe, local_folder(storage), read_manifest(file_of(manifest)).digest)
    print(found.reason)
    location = found.champion.uri if found.champion else ""
    return Done(location=location, metadata={"train": found.train}, text=found.reason)


@ends_in_lines
def promote(
    recipe: Recipe,
    storage: str,
    *,
    margin: float,
    manifest: str,
    runs: Sequence[Mapping[str, Any]],
    evaluations: str,
) -> Done:
    """Decide between champion and challenger by their scores; the previous champion stays in the registry."""
    from appo.data.manifest import read_manifest
    from appo.reports.promotion import promote as decide

    place = Place(plan.layout(recipe, storage).report)
    decision = decide(
        recipe,
        local_folder(storage),
        algorithm=recipe.algorithms[0],
        checkpoints={str(run["name"]): f"{run['location']}/checkpoint" for run in runs},
        evaluations=fetch_folder(evaluations),
        manifest_digest=read_manifest(file_of(manifest)).digest,
        out=place.local,
        margin=margin,
    )
    place.publish()
    print(decision.reason)
    return Done(
        location=place.location,
        metrics=numbers(json.loads(decision.to_json())),
        text=f"**{'Promoted' if decision.promote else 'Kept the champion'}**\n\n{decision.reason}\n",
    )
