"""Small real video files, good and broken, written with PyAV for the tests of this room."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

MILLISECOND = Fraction(1, 1000)


def write_clip(
    path: Path,
    *,
    num_frames: int = 16,
    size: tuple[int, int] = (48, 64),
    times_ms: Sequence[int] | None = None,
    seed: int = 0,
    audio_s: float = 0.0,
    preset: str = "ultrafast",
    gop: int | None = None,
) -> Path:
    """H.264 in the container of the suffix. size: (height, width). The frame number shows as brightness; the
    top left quarter is red; `seed` varies the noise, so that files differ. times_ms: presentation times.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = size
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "18", "preset": preset}
        if gop is not None:
            stream.gop_size = gop
        stream.codec_context.time_base = MILLISECOND
        sound = container.add_stream("aac", rate=16000) if audio_s else None
        for index in range(num_frames):
            pixels = np.full((height, width, 3), 255 * index // max(1, num_frames - 1), np.uint8)
            pixels[: height // 2, : width // 2] = (255, 0, 0)
            pixels[-4:] = rng.integers(0, 255, (4, width, 3), dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times_ms[index] if times_ms is not None else 40 * index
            frame.time_base = MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _write_silence(container, sound, audio_s)
    return path


def write_sound(path: Path) -> Path:
    """A file with an audio stream and no video."""
    with av.open(str(path), "w") as container:
        _write_silence(container, container.add_stream("aac", rate=16000), 1.0)
    return path


def write_nothing(path: Path) -> Path:
    """A video stream is declared, and not one frame of it is there."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    return path


def _write_silence(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    frame = av.AudioFrame.from_ndarray(
        np.zeros((1, int(16000 * seconds)), np.float32), format="fltp", layout="mono"
    )
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def rotate(path: Path, degrees: int) -> Path:
    """Write a display matrix into the MP4, as a phone held sideways does. degrees: 90, 180 or 270, clockwise."""
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4
    at = header + 4 + (32 if data[header] == 1 else 20) + 16
    matrix = {
        90: (0, 1, 0, -1, 0, 0, 0, 0, 1),
        180: (-1, 0, 0, 0, -1, 0, 0, 0, 1),
        270: (0, -1, 0, 1, 0, 0, 0, 0, 1),
    }[degrees]
    data[at : at + 36] = struct.pack(
        ">9i", *(v << 30 if i % 3 == 2 else v << 16 for i, v in enumerate(matrix))
    )
    path.write_bytes(data)
    return path


def read_back(path: Path) -> np.ndarray:
    """All frames, by PyAV: a decoder other than the one under test. (N, H, W, 3) uint8, unrotated."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
