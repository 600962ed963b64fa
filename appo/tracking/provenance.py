"""A recipe and a process -> the parameters and tags that say where a run comes from.

Feeds `tracker`. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.config import Recipe

# What may differ between two trainings whose results may still be averaged: they ask the same question of the
# same method on the same data, only with other seeds, names, machines or servers.
_NOT_COMPARED = ("name", "description", "algorithms", "tracking", "cluster", "evaluation")


def parameters(recipe: Recipe) -> dict[str, str]:
    """Every value of the recipe under its dotted key: `policy.temperature` -> "1.0"."""
    flat: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value if isinstance(value, str) else json.dumps(value)

    walk("", recipe.model_dump(mode="json"))
    return flat


def comparison_digest(recipe: Recipe) -> str:
    """First 12 hex digits over all settings that change what is trained; seeds are left out.

    Runs that share it, their algorithm, model and manifest are repetitions of one another: a mean over them
    means something. A changed learning rate makes another digest, hence another parent run.
    """
    values = recipe.model_dump(mode="json", exclude=set(_NOT_COMPARED))
    values["training"].pop("seeds", None)
    values["policy"].pop("algorithm", None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def provenance_tags(recipe: Recipe, manifest_digest: str | None = None) -> dict[str, str]:
    """Tags of git revision, image, recipe, manifest, KFP run and host; the unknown are left out."""
    env = os.environ
    tags = {
        "appo.recipe": recipe.name,
        "appo.recipe_digest": recipe.digest,
        "appo.comparison_digest": comparison_digest(recipe),
        "appo.manifest_digest": manifest_digest,
        "mlflow.source.git.commit": env.get("APPO_GIT_REVISION") or _git_revision(),
        "appo.image": env.get("APPO_IMAGE") or env.get("IMAGE_DIGEST"),
        "appo.kfp_run_id": env.get("KFP_RUN_ID"),
        "appo.kfp_run_name": env.get("KFP_RUN_NAME"),
        "appo.pod": env.get("KFP_POD_NAME") or env.get("POD_NAME"),
        "appo.host": socket.gethostname(),
    }
    return {name: value for name, value in tags.items() if value}


@cache
def _git_revision() -> str | None:
    """The commit this package was imported from, "-dirty" when files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git on this machine: the tag is left out
        return None
    return f"{head}-dirty" if changed else head
