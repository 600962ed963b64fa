"""What can be refused before a run costs anything: one list of checks behind `appo validate`, `run` and `submit`.

A check is one function in `settings` (needs nothing), `places` (files, a store) or `machine` (a GPU); `registry` says
how they are run. Free of torch until a check that needs a GPU runs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from appo.checks import machine, places, settings
from appo.checks.machine import gpus
from appo.checks.registry import (
    NEEDS,
    Check,
    CheckFailed,
    Need,
    Outcome,
    Subject,
    check,
    checks,
    refuse,
    run_checks,
)
from appo.config import Recipe

__all__ = [
    "ALONE",
    "FROM_AFAR",
    "NEEDS",
    "OF_DATA",
    "OF_SETTINGS",
    "OF_STORED_SIZE",
    "OF_TRAINING",
    "ON_GPU",
    "POD_FOLDERS",
    "Check",
    "CheckFailed",
    "Need",
    "Outcome",
    "Subject",
    "able_here",
    "at_home",
    "before_training",
    "check",
    "checks",
    "gpus",
    "here",
    "machine",
    "on_cluster",
    "places",
    "processes_here",
    "processes_on_cluster",
    "refuse",
    "run_checks",
    "settings",
    "submitted",
]


# What checks may need for a recipe that is only shown or compiled, one that is sent elsewhere, and where it trains.
ALONE: tuple[Need, ...] = ("nothing",)
FROM_AFAR: tuple[Need, ...] = ("nothing", "files", "server")
ON_GPU: tuple[Need, ...] = ("gpu",)
# Checks of a single step that is run by hand.
OF_DATA = ("source", "records", "names in the records", "records in the store")
OF_TRAINING = ("seeds", "rewards", "groups", "layout")
# What a recipe says by itself, whatever machine it runs on.
OF_SETTINGS = ("seeds", "algorithms", "rewards", "source", "benchmarks")
STORED: tuple[Need, ...] = ("server",)
OF_STORED_SIZE = ("stored model fits",)
# What pods of trainings see beside stores (k8s/components/training-runtime); who checks the recipe does not.
POD_FOLDERS = ("/cache", "/scratch")


def here(recipe: Recipe, variants: Sequence[str] = ()) -> Subject:
    """A run whose first step this process is, or that happens on this machine."""
    elsewhere = POD_FOLDERS if on_cluster() else ()
    return Subject(recipe, tuple(variants), processes_here(recipe), elsewhere, trains_here=not on_cluster())


def at_home(recipe: Recipe, variants: Sequence[str] = ()) -> Subject:
    """A recipe looked at by a person: files are this machine's, processes are as the cluster section says."""
    return Subject(recipe, tuple(variants), processes_on_cluster(recipe))


def submitted(recipe: Recipe, variants: Sequence[str] = ()) -> Subject:
    """A run that is to happen on a cluster, looked at from here."""
    return Subject(recipe, tuple(variants), processes_on_cluster(recipe), POD_FOLDERS, submitted=True)


def before_training(recipe: Recipe, *, algorithm: str, processes: int) -> None:
    """Refuse one training where it is about to start: by its settings, and by the GPUs that it would run on."""
    one = recipe.model_copy(update={"algorithms": (algorithm,)})
    subject = Subject(one, processes=processes, trains_here=True)
    refuse(subject, ALONE, only=OF_TRAINING)
    if gpus():
        refuse(subject, ON_GPU)
        refuse(subject, STORED, only=OF_STORED_SIZE)


def able_here() -> tuple[Need, ...]:
    """What checks can have on this machine, for a run that happens here."""
    return ("nothing", "files", "gpu", "server") if gpus() else ("nothing", "files", "server")


def processes_on_cluster(recipe: Recipe) -> int:
    """Processes of one training where the recipe's cluster section is obeyed: one a GPU, or one without any."""
    return max(1, recipe.cluster.gpus_per_node) * recipe.cluster.nodes


def on_cluster() -> bool:
    """Whether this process is a step of a run on a cluster (pipelines/pods.py sets the variable)."""
    return bool(os.environ.get("KFP_RUN_ID"))


def processes_here(recipe: Recipe) -> int:
    """Processes of one training that is started from this process: as the cluster section says, or one a GPU here."""
    return processes_on_cluster(recipe) if on_cluster() else max(1, gpus())
