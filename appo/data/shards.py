"""Decoded videos <-> Parquet shards, content-addressed.

A row is found by the SHA-256 of the video it was decoded from, inside a folder named for the sampling and
encoding settings: a recipe that changes quotas, splits or questions finds its frames again, one that changes
sampling uses another folder. The files are those of `datasets`, written without it (docs/data.md says why; a test
compares the schemas): `load_dataset("parquet", ...)` reads them. Images of frames hold `frames_per_image` frames one
above the other: one PNG for a whole small video decodes ten times as fast as sixteen; JPEG keeps a frame an image,
because its blocks would bleed across the seams.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from appo.config import Data, Video
from appo.data.sampling import sampled_fps
from appo.data.video import VideoFrames

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
KEYS_FIELD = b"appo.keys"
MAX_IMAGE_PIXELS = 1 << 24  # of one stored image: decoding needs three times as many bytes at once
ROW_GROUP_BYTES = 1 << 20  # what reading one video touches
SHARD_ROWS, SHARD_BYTES = 128, 32 << 20  # what an interruption can lose


@dataclass(frozen=True, slots=True)
class EncodedFrames:
    """One row of a shard. key: hex SHA-256 of the file that was decoded. images: PNG or JPEG files."""

    key: str
    images: tuple[bytes, ...]
    frames_per_image: int
    timestamps_s: tuple[float, ...]
    frame_indices: tuple[int, ...]
    height: int
    width: int
    duration_s: float
    total_frames: int

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.images))


def settings_key(video: Video, data: Data) -> str:
    """Names the folder of shards: 16 hex digits over everything that changes a stored frame."""
    how: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "video": video.model_dump(mode="json"),
        "encoding": data.encoding,
    }
    if data.encoding == "jpeg":
        how["quality"] = data.jpeg_quality
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]


def encoding_in_words(data: Data) -> str:
    return f"jpeg, quality {data.jpeg_quality}" if data.encoding == "jpeg" else "png"


def encode(key: str, video: VideoFrames, *, encoding: str, jpeg_quality: int) -> EncodedFrames:
    """Frames as they are stored. encoding: "png" gives back every pixel, "jpeg" is 5 to 10 times smaller."""
    count, height, width, _ = video.frames.shape
    together = 1 if encoding == "jpeg" else max(1, min(count, MAX_IMAGE_PIXELS // (height * width)))
    images = [
        encode_image(video.frames[at : at + together].reshape(-1, width, 3), encoding, jpeg_quality)
        for at in range(0, count, together)
    ]
    return EncodedFrames(
        key=key,
        images=tuple(images),
        frames_per_image=together,
        timestamps_s=tuple(video.timestamps_s.tolist()),
        frame_indices=video.frame_indices,
        height=height,
        width=width,
        duration_s=video.duration_s,
        total_frames=video.total_frames,
    )


def encode_image(pixels: np.ndarray, encoding: str, jpeg_quality: int) -> bytes:
    """(H, W, 3) uint8 -> a PNG or JPEG file."""
    from PIL import Image

    out = io.BytesIO()
    if encoding == "png":
        Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    else:
        # 4:4:4: halving the colour resolution of a 28-pixel object would lose it
        Image.fromarray(pixels).save(out, "JPEG", quality=jpeg_quality, subsampling=0)
    return out.getvalue()


def decode(row: EncodedFrames) -> VideoFrames:
    """The inverse of `encode`."""
    from PIL import Image

    parts = []
    for image in row.images:
        with Image.open(io.BytesIO(image)) as opened:
            parts.append(np.asarray(opened).reshape(-1, row.height, row.width, 3))
    frames = parts[0] if len(parts) == 1 else np.concatenate(parts)
    timestamps = np.asarray(row.timestamps_s, dtype=np.float64)
    return VideoFrames(
        frames=frames,
        timestamps_s=timestamps,
        frame_indices=row.frame_indices,
        fps=sampled_fps(timestamps, row.duration_s),
        duration_s=row.duration_s,
        total_frames=row.total_frames,
    )


def shard_schema() -> pa.Schema:
    """The Arrow schema that `datasets.Features` of these columns make, with the description it keeps in it."""
    import pyarrow as pa

    columns = {
        "key": ("string", pa.string()),
        "images": ("binary", pa.list_(pa.binary())),
        "frames_per_image": ("int32", pa.int32()),
        "timestamps_s": ("float64", pa.list_(pa.float64())),
        "frame_indices": ("int64", pa.list_(pa.int64())),
        "height": ("int32", pa.int32()),
        "width": ("int32", pa.int32()),
        "duration_s": ("float64", pa.float64()),
        "total_frames": ("int64", pa.int64()),
    }
    features = {}
    for name, (dtype, kind) in columns.items():
        value = {"dtype": dtype, "_type": "Value"}
        features[name] = {"feature": value, "_type": "List"} if pa.types.is_list(kind) else value
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.schema([pa.field(name, kind) for name, (_, kind) in columns.items()], metadata=metadata)


def shard_name(rows: Sequence[EncodedFrames]) -> str:
    """File name from the keys it holds, so that the same work done twice gives the same file."""
    digest = hashlib.sha256("".join(row.key for row in rows).encode()).hexdigest()[:24]
    return f"frames-{digest}.parquet"


def shard_bytes(rows: Sequence[EncodedFrames]) -> bytes:
    """A whole shard as a Parquet file; equal rows give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = shard_schema()
    each = max(1, ROW_GROUP_BYTES // max(1, max(row.nbytes for row in rows)))
    # The keys stand in the footer: to list a shard in S3 takes one small read, not one for each row group.
    index = json.dumps({"keys": [row.key for row in rows], "rows_per_group": each})
    schema = schema.with_metadata({**(schema.metadata or {}), KEYS_FIELD: index})
    table = pa.Table.from_pylist(
        [{name: getattr(row, name) for name in schema.names} for row in rows], schema
    )
    out = io.BytesIO()
    pq.write_table(
        table,
        out,
        row_group_size=each,
        compression="NONE",  # the images are compressed already
        use_dictionary=False,
        write_page_checksum=True,
    )
    return out.getvalue()


def shard_index(file: Any) -> tuple[list[str], int]:
    """(keys in order of rows, rows in a row group) of an open `pyarrow.parquet.ParquetFile`."""
    index = json.loads(file.metadata.metadata[KEYS_FIELD])
    return index["keys"], index["rows_per_group"]


def row_from(record: dict[str, Any]) -> EncodedFrames:
    """A row as pyarrow gives it back."""
    values = dict(record)
    for name in ("images", "timestamps_s", "frame_indices"):
        values[name] = tuple(values[name])
    return EncodedFrames(**values)


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("frames-*.parquet"))
