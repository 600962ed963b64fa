"""How steps hand over: what a finished one tells the next, and where the files of both lie.

Files are computed in folders of this machine: the storage root itself, or scratch that is published to S3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo import hub
from appo.folders import fetch_folder, local_folder, publish_folder


@dataclass(frozen=True, slots=True)
class Done:
    """What a finished step tells the next one.

    location: folder or s3:// prefix of the whole result. metadata: shown beside the artifact, read by later
    steps.
    metrics: numbers for the run's page. text: the artifact's own content (a summary, a card, a report).
    """

    location: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""
    markdown: str = ""

    def fill(self, artifact: Any) -> None:
        """Hand over to a pipeline artifact (anything with `metadata` and `path`)."""
        artifact.metadata.update({"location": self.location, **self.metadata})
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(self.text, encoding="utf-8")


class Place:
    """Where a step writes: the location itself, or a scratch folder that is published to it (S3)."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.local = local_folder(location)

    def of(self, path: Path) -> str:
        """The published name of a file below `local`."""
        return f"{self.location}/{Path(path).relative_to(self.local).as_posix()}"

    def publish(self) -> None:
        publish_folder(self.local, self.location)


def file_of(location: str) -> Path:
    """A file that an earlier step left, with the folder around it."""
    folder, _, name = location.rpartition("/")
    return fetch_folder(folder) / name


def checkpoint_of(location: str) -> str:
    """A checkpoint's folder on this machine; from S3 and from the hub it is fetched where it is not there yet."""
    if location.startswith("s3://"):
        return str(fetch_folder(location))
    name = hub.hub_name(location)
    return location if name is None else str(hub.download(name))


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a run's page can show: the numbers, not the texts and flags."""
    return {k: float(v) for k, v in summary.items() if isinstance(v, int | float) and not isinstance(v, bool)}
