"""A part of a video, or a folder of frames -> the frames a model sees, as if it were a file of its own.

MVBench's originals are whole videos with the `start` and `end` of the part that is asked about, and one of its tasks
ships frames as images. Times count from the start of the part, as they would in a file cut there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from appo.config import Video
from appo.data.sampling import fit_size, sampled_fps
from appo.data.schema import VideoSample
from appo.data.video import Part, VideoError, VideoFrames, choose_part, resize
from appo.storage import sha256_file

SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True, slots=True)
class Clip:
    """part: seconds in the file, None for all of it. fps: frames a second of a folder of frames."""

    part: Part | None = None
    fps: float | None = None

    def key(self, sha256: str) -> str:
        """What the frames of this clip are stored under; the whole of a file under its own hash."""
        if self.part is None and self.fps is None:
            return sha256
        return hashlib.sha256(f"{sha256} {self.part} {self.fps}".encode()).hexdigest()


WHOLE = Clip()


def clip_of(sample: VideoSample) -> Clip:
    """From the sample's `extra`: `clip` as [start, end] in seconds, `frame_rate` of a folder of frames."""
    part, fps = sample.extra.get("clip"), sample.extra.get("frame_rate")
    return Clip(
        None if part is None else (float(part[0]), float(part[1])), None if fps is None else float(fps)
    )


def is_frame_folder(path: Path) -> bool:
    return path.is_dir() and any(True for _ in _images(path))


def folder_stamp(path: Path) -> str:
    """Changes when an image is added, taken away or written anew."""
    states = "".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in _images(path))
    return hashlib.sha256(states.encode()).hexdigest()[:16]


def folder_sha256(path: Path) -> str:
    """Over the names and contents of the images, in order."""
    digest = hashlib.sha256()
    for image in _images(path):
        digest.update(f"{image.name} {sha256_file(image)}\n".encode())
    return digest.hexdigest()


def decode_folder(path: Path, video: Video, clip: Clip) -> VideoFrames:
    """The images of a folder, in order of name, as frames that follow one another at `clip.fps`.

    Raises VideoError for a folder without a rate, for a part that holds no frame, for an unreadable image.
    """
    from PIL import Image, UnidentifiedImageError

    images = _images(path)
    if clip.fps is None:
        raise VideoError(path, "is a folder of frames, and nothing says how many there are a second")
    starts = np.arange(len(images)) / clip.fps
    indices, timestamps, duration = choose_part(path, starts, len(images) / clip.fps, video, clip.part)
    frames, size = [], None
    for index in indices:
        try:
            with Image.open(images[index]) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            size = size or fit_size(
                *pixels.shape[:2], max_pixels=video.max_pixels, min_pixels=video.min_pixels
            )
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
            raise VideoError(images[index], f"cannot be read as an image: {error}") from error
        frames.append(resize(pixels, size))
    fps = sampled_fps(timestamps, duration)
    return VideoFrames(np.stack(frames), timestamps, indices, fps, duration, len(images))


def _images(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
