"""Samples <-> the manifest: one JSONL file that every later step starts from.

The first line is the header, each further line one `VideoSample`. Keys and lines have a fixed order and
nothing in it depends on clocks, machines or the order of work, so equal inputs give equal bytes, and its
SHA-256 names the data in MLflow and in Kubeflow's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.data.schema import SPLITS, SampleError, VideoSample
from appo.errors import UserError
from appo.storage import is_s3, read_bytes, write_atomic

KIND, VERSION = "appo.manifest", 1


class ManifestError(UserError, ValueError):
    """A manifest that cannot be read; names the file, the line and the reason."""


@dataclass(frozen=True)
class Manifest:
    """header: as written. digest: hex SHA-256 of the file. path: where it was read from."""

    header: Mapping[str, Any]
    samples: tuple[VideoSample, ...]
    path: Path
    digest: str

    def split(self, name: str) -> list[VideoSample]:
        """The samples of one split, in manifest order. Raises ManifestError for an unknown split."""
        if name not in SPLITS:
            raise ManifestError(f"split {name!r}: must be one of {', '.join(SPLITS)}")
        return [sample for sample in self.samples if sample.split == name]

    @property
    def root(self) -> str:
        """Where the samples' paths start: an absolute folder, an archive or an s3:// URI."""
        return resolve(self.path, str(self.header["root"]))

    @property
    def frames(self) -> str | None:
        """Folder or s3:// URI of the frame shards, None when frames are decoded on the fly."""
        frames = self.header.get("frames")
        return None if frames is None else resolve(self.path, str(frames))

    def locate(self, sample: VideoSample) -> str:
        """Path or URI of the sample's video, or of its image when it has none."""
        from appo.data.media import MediaRoot

        name = sample.video or sample.image
        assert name is not None  # VideoSample refuses a record without both
        return MediaRoot(self.root).locate(name)


def resolve(manifest_path: Path, place: str) -> str:
    """A header's path as an absolute one: relative paths start at the manifest's folder, URIs stay as they
    are.
    """
    if is_s3(place):
        return place
    return str(Path(os.path.abspath(manifest_path.parent / place)))


def relative_place(place: str | Path, folder: Path) -> str:
    """How `place` is written into a manifest in `folder`: relative when it lies below, so both can move."""
    if is_s3(place):
        return str(place)
    absolute, base = os.path.abspath(place), os.path.abspath(folder)
    return (
        os.path.relpath(absolute, base)
        if Path(base) in (Path(absolute), *Path(absolute).parents)
        else absolute
    )


def write_manifest(path: Path, samples: Sequence[VideoSample], **header: Any) -> Manifest:
    """Write header and samples in the given order, whole or not at all, and return what was written."""
    manifest, data = build_manifest(path, samples, **header)
    write_atomic(path, data)
    return manifest


def build_manifest(path: Path, samples: Sequence[VideoSample], **header: Any) -> tuple[Manifest, bytes]:
    """The manifest that would stand at `path`, and its bytes. Raises ManifestError for a repeated id."""
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise ManifestError(
                f"{path}: id {sample.id!r} appears twice; ids must be unique within a manifest"
            )
        seen.add(sample.id)
    full = {"kind": KIND, "version": VERSION, **header}
    lines = [_line(full), *(_line(sample.to_json()) for sample in samples)]
    data = ("\n".join(lines) + "\n").encode()
    return Manifest(full, tuple(samples), Path(path), hashlib.sha256(data).hexdigest()), data


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest; a folder stands for the `manifest.jsonl` inside it.

    Raises ManifestError naming file, line and reason.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.jsonl"
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest; `appo data assemble` writes one")
    data = read_bytes(path)
    samples: list[VideoSample] = []
    header: dict[str, Any] = {}
    seen: set[str] = set()
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 text ({error.reason}); name a manifest.jsonl") from error
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if number == 1:
                header = _checked_header(record)
                continue
            sample = VideoSample.from_json(record)
        except (json.JSONDecodeError, SampleError, ManifestError) as error:
            raise ManifestError(f"{path}, line {number}: {error}") from error
        if sample.id in seen:
            raise ManifestError(f"{path}, line {number}: id {sample.id!r} appears twice")
        seen.add(sample.id)
        samples.append(sample)
    if not header:
        raise ManifestError(f"{path}: is empty")
    return Manifest(header, tuple(samples), path, hashlib.sha256(data).hexdigest())


def _checked_header(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise ManifestError(f'first line must be a header with "kind": "{KIND}"')
    if record.get("version") != VERSION:
        raise ManifestError(
            f"version={record.get('version')!r}: this program reads {VERSION}; assemble again"
        )
    if "root" not in record:
        raise ManifestError("root: is missing in the header")
    return record


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
