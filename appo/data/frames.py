"""A sample -> its frames: from shards, or by decoding its video now.

The seam that training and evaluation read through. Shards were written by `appo.data.assemble`; a recipe with
`data.cache: none` decodes on the fly with the very same sampling. A source may be copied to data-loader
workers.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from appo.config import Recipe, Video
from appo.data.clips import WHOLE, Clip, clip_of, decode_folder
from appo.data.manifest import Manifest, ManifestError
from appo.data.media import MediaRoot, Medium
from appo.data.sampling import fit_size
from appo.data.schema import VideoSample
from appo.data.shards import ROW_GROUP_BYTES, EncodedFrames, decode, row_from, shard_index
from appo.data.video import VideoError, VideoFrames, decode_bytes, decode_video, resize
from appo.storage import StorageError, is_s3, open_binary, sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT_BYTES = 256 << 20  # of encoded rows a process keeps; a demo's whole set, a sliver of a real one
OPEN_SHARDS = 16


class FrameSource(Protocol):
    def load(self, sample: VideoSample) -> VideoFrames:
        """The sample's frames. Raises VideoError when it has no video or no frames can be had."""
        ...

    def image(self, sample: VideoSample) -> Image | None:
        """The image beside the video in the prompt, scaled to the pixel budget; None without one."""
        ...

    def identity(self, sha256: str) -> str:
        """Names the pixels that this source makes of the file with this hash: equal names, equal pixels."""
        ...


def open_frames(manifest: Manifest, recipe: Recipe) -> FrameSource:
    """Shards when the manifest names some, else decoding on the fly.

    Raises ManifestError when the recipe samples otherwise than the manifest was assembled: training and
    evaluation would see other frames than they say.
    """
    settings = recipe.video.model_dump(mode="json")
    assembled = manifest.header.get("video")
    if assembled is not None and assembled != settings:
        changed = ", ".join(
            f"video.{key} is {settings[key]!r}, was {assembled.get(key)!r}"
            for key in settings
            if settings[key] != assembled.get(key)
        )
        raise ManifestError(f"{manifest.path}: assembled with other sampling ({changed}); assemble again")
    if manifest.frames is not None:
        return ShardFrames(manifest.frames)
    return DecodedFrames(manifest.root, recipe.video)


class DecodedFrames:
    """Decodes each time it is asked: no disk, slower steps."""

    def __init__(self, root: str, video: Video):
        self._root, self._video = MediaRoot(root), video

    def load(self, sample: VideoSample) -> VideoFrames:
        if sample.video is None:
            raise VideoError(sample.id, "has no video, only an image")
        medium = self._find(sample.video, sample.video_sha256)
        return decode_medium(medium, self._video, clip_of(sample))

    def image(self, sample: VideoSample) -> Image | None:
        if sample.image is None:
            return None
        return as_image(decode_image(self._find(sample.image, image_sha256(sample)), self._video))

    def identity(self, sha256: str) -> str:
        settings = json.dumps(self._video.model_dump(mode="json"), sort_keys=True)
        return f"decoded-{hashlib.sha256(settings.encode()).hexdigest()[:16]}/{sha256}"

    def _find(self, name: str, sha256: str | None) -> Medium:
        """The file, refused when it is no longer the one in the manifest: its pixels go by that one's name."""
        medium = self._root.find(name)
        if sha256 is None:
            return medium
        if medium.local is None:
            medium = replace(medium, data=medium.read())  # over the network: once
        with medium.open() as file:
            found = sha256_of(file)
        if found != sha256:
            raise VideoError(
                medium.uri,
                f"changed since the set was assembled (sha256 {found[:12]}..., was {sha256[:12]}...); "
                "assemble again",
            )
        return medium


class ShardFrames:
    """Reads the rows of one settings folder, local or S3; the folder is listed once, rows are read when asked
    for.
    """

    def __init__(self, place: str):
        self._place = place
        self._rows: dict[str, tuple[str, int]] = {}  # key -> shard, row group
        self._kept: OrderedDict[str, EncodedFrames] = OrderedDict()
        self._kept_bytes = 0
        self._lock = Lock()
        self._list()

    def __getstate__(self) -> dict[str, Any]:
        return {"_place": self._place, "_rows": self._rows}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=OrderedDict(), _kept_bytes=0, _lock=Lock())

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def load(self, sample: VideoSample) -> VideoFrames:
        if sample.video is None or sample.video_sha256 is None:
            raise VideoError(sample.id, "has no video, only an image")
        return decode(self.row(sample.video_sha256, sample.id))

    def image(self, sample: VideoSample) -> Image | None:
        key = image_sha256(sample)
        return None if key is None else as_image(decode(self.row(key, sample.id)).frames[0])

    def identity(self, sha256: str) -> str:
        # The folder's name is a digest of every setting that changes a stored frame.
        return f"{self._place.rpartition('/')[2]}/{sha256}"

    def row(self, key: str, name: str) -> EncodedFrames:
        """The stored row of a file; `name` stands in the error. Safe to call from several threads."""
        with self._lock:
            return self._row(key, name)

    def _row(self, key: str, name: str) -> EncodedFrames:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if key not in self._rows:
            self._list()  # another process may have added it
        if key not in self._rows:
            raise VideoError(
                name, f"its frames (sha256 {key[:12]}...) are not in {self._place}; assemble again"
            )
        shard, group = self._rows[key]
        wanted = None
        # Neighbours of the row group come along for free when they are small.
        for record in _kept_open(shard).read_row_group(group).to_pylist():
            row = row_from(record)
            if row.key == key:
                wanted = row
            if row.key == key or row.nbytes <= ROW_GROUP_BYTES // 4:
                self._keep(row)
        assert wanted is not None
        return wanted

    def _keep(self, row: EncodedFrames) -> None:
        if row.key in self._kept:
            return
        self._kept[row.key] = row
        self._kept_bytes += row.nbytes
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._kept_bytes -= dropped.nbytes

    def _list(self) -> None:
        known = {shard for shard, _ in self._rows.values()}
        for shard, keys, each in list_rows(self._place, skip=known):
            for at, key in enumerate(keys):
                self._rows.setdefault(key, (shard, at // each))


def image_sha256(sample: VideoSample) -> str | None:
    """Of the image beside the video, as assembly wrote it down; None without one."""
    return sample.extra.get("image_sha256")


def list_rows(place: str, *, skip: Collection[str] = ()) -> Iterator[tuple[str, list[str], int]]:
    """(shard, its keys in order, rows in a row group) for each shard at `place` but those in `skip`."""
    shards = [shard for shard in list_shards(place) if shard not in skip]
    with ThreadPoolExecutor(8 if is_s3(place) else 1) as pool:  # the time goes into waiting for S3
        for shard, (keys, each) in zip(shards, pool.map(_read_index, shards), strict=True):
            yield shard, keys, each


def _read_index(shard: str) -> tuple[list[str], int]:
    return shard_index(open_shard(shard))


def list_shards(place: str) -> list[str]:
    """Paths or URIs of the shards in a folder or below an S3 prefix, in order of name."""
    if is_s3(place):
        from appo.objectstore import list_objects

        return sorted(f"{place}/{name}" for name, _ in list_objects(place) if name.endswith(".parquet"))
    from pathlib import Path

    return sorted(str(path) for path in Path(place).glob("frames-*.parquet"))


def open_shard(shard: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises StorageError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if is_s3(shard):
            return pq.ParquetFile(open_binary(shard), page_checksum_verification=True)
        return pq.ParquetFile(shard, memory_map=True, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"{shard}: is not a readable shard: {error}; delete it and assemble again"
        ) from error


_kept_open = lru_cache(maxsize=OPEN_SHARDS)(open_shard)


def decode_medium(medium: Medium, video: Video, clip: Clip = WHOLE) -> VideoFrames:
    """Decode a video where it lies: by path when it is a local file or folder of frames, else from its bytes."""
    if medium.local is None:
        return decode_bytes(medium.read(), video, name=medium.uri, part=clip.part)
    if medium.local.is_dir():
        return decode_folder(medium.local, video, clip)
    return decode_video(medium.local, video, clip.part)


def decode_image(medium: Medium, video: Video) -> np.ndarray:
    """(H, W, 3) uint8 of an image file, scaled to the pixel budget of a frame. Raises VideoError."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(medium.read())) as opened:
            pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        size = fit_size(*pixels.shape[:2], max_pixels=video.max_pixels, min_pixels=video.min_pixels)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise VideoError(medium.uri, f"cannot be read as an image: {error}") from error
    return resize(pixels, size)


def as_image(pixels: np.ndarray) -> Image:
    from PIL import Image

    return Image.fromarray(pixels)
