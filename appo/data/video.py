"""A video file -> the frames a model sees, with their true times.

One definition for training, evaluation and shards; `sampling` holds its arithmetic. Frames are spread evenly in
time (or at a given rate), taken from the presentation times of the file, so that variable frame rates do not
shift them; scaled to a pixel budget with the aspect ratio kept and both sides multiples of 28, the size of a
merged visual token of Qwen2.5-VL. A video that cannot be decoded raises `VideoError`: no other video ever takes
its place.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from appo.config import Video
from appo.data.mp4 import frame_size
from appo.data.sampling import TEMPORAL_PATCH, choose_frames, fit_size, sampled_fps
from appo.errors import UserError

MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"
# Lists of other files that FFmpeg would open, wherever they lie.
PLAYLISTS = (b"#EXTM3U", b"ffconcat")
NO_TEXT = frozenset(range(32)) - frozenset(b"\t\n\r\x0c\x1b")
FAULT_TOLERANCE = 1e-9
Part = tuple[float, float]  # (start, end) in seconds from the first frame


class VideoError(UserError, ValueError):
    """A video that gives no frames: where it lies, and the decoder's reason."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


@dataclass(frozen=True)
class VideoFrames:
    """Sampled frames of one video.

    frames: (F, H, W, 3) uint8 RGB, F even. timestamps_s: (F,) float64, seconds from the first frame of the
    file. frame_indices: positions in the file, ascending (the last one twice when the file has an odd number
    to give). fps: sampled frames per second; duration_s: seconds from the first frame's start to the last
    one's end. total_frames: frames in the file.
    """

    frames: np.ndarray
    timestamps_s: np.ndarray
    frame_indices: tuple[int, ...]
    fps: float
    duration_s: float
    total_frames: int

    @property
    def second_per_grid(self) -> float:
        """Seconds between two temporal patches, as `second_per_grid_ts` of Qwen2.5-VL wants it."""
        return TEMPORAL_PATCH / self.fps


def choose_part(
    name: str | Path, starts_s: np.ndarray, duration_s: float, video: Video, part: Part | None
) -> tuple[tuple[int, ...], np.ndarray, float]:
    """(indices, timestamps, duration) of the frames to take from a part of a video, None for the whole; times count
    from the part's first frame. Raises VideoError for a part without frames."""
    first, last = 0, len(starts_s)
    if part is not None:
        # 1e-6: a part that starts at a frame's time has that frame, whatever the rounding
        first, last = np.searchsorted(starts_s, np.asarray(part) - 1e-6).tolist()
        if first >= last:
            raise VideoError(
                name, f"holds no frame from {part[0]:g} to {part[1]:g} s, its length is {duration_s:.1f} s"
            )
        duration_s = min(part[1], duration_s) - float(starts_s[first])
    times = starts_s[first:last] - starts_s[first]
    chosen = choose_frames(times, duration_s, video)
    return tuple(first + index for index in chosen), times[list(chosen)], duration_s


def decode_video(path: str | Path, video: Video, part: Part | None = None) -> VideoFrames:
    """The frames that `video` asks for, of `part` alone where one is given. Raises VideoError(path, reason); never
    gives other frames."""
    return _decode(path, str(path), video, part)


def decode_bytes(data: bytes, video: Video, *, name: str, part: Part | None = None) -> VideoFrames:
    """`decode_video` for a file held in memory (an archive's entry, an object); `name` stands in errors."""
    return _decode(name, io.BytesIO(data), video, part)


def _decode(name: str | Path, file: str | io.BytesIO, video: Video, part: Part | None) -> VideoFrames:
    import decord

    decord.logging.set_level(decord.logging.FATAL)  # its reasons come back as exceptions
    if isinstance(file, str):
        _check_file(Path(file))
    elif not file.getbuffer().nbytes:
        raise VideoError(name, "is empty (0 bytes)")
    _refuse_text(name, file)
    reader, size = _open_to_fit(name, file, video)
    total = len(reader)
    try:
        spans = np.asarray(reader.get_frame_timestamp(np.arange(total)), dtype=np.float64).reshape(total, 2)
    except _decord_errors() as error:
        raise VideoError(name, f"has no readable timestamps: {_reason(error)}") from error
    starts, duration = _timeline(name, spans)
    _check_whole(name, file, float(spans[:, 1].max()))
    indices, timestamps, duration = choose_part(name, starts, duration, video, part)
    unique = sorted(set(indices))
    frames = _read(name, reader, unique)
    if frames.shape[1:3] != size:  # the container's header told another size than its frames have
        frames = _read(name, _open(name, file, _fit(name, frames.shape[1], frames.shape[2], video)), unique)
    if len(unique) != len(indices):
        frames = np.concatenate([frames, frames[-1:].repeat(len(indices) - len(unique), axis=0)])
    return VideoFrames(frames, timestamps, indices, sampled_fps(timestamps, duration), duration, total)


def _timeline(name: str | Path, spans: np.ndarray) -> tuple[np.ndarray, float]:
    if not np.isfinite(spans).all():
        raise VideoError(name, "has frames without a time; remux it, e.g. with ffmpeg -fflags +genpts")
    starts = spans[:, 0] - spans[:, 0].min()
    if (np.diff(starts) < 0).any():
        raise VideoError(
            name, "has frame times that run backwards; remux it, e.g. with ffmpeg -fflags +genpts"
        )
    return starts, float(max(spans[:, 1].max() - spans[:, 0].min(), starts[-1]))


def _open_to_fit(name: str | Path, file: str | io.BytesIO, video: Video) -> tuple[Any, tuple[int, int]]:
    """A reader that gives frames of the wanted size, and that size.

    decord scales (bicubic, in FFmpeg) while it converts colours, which costs a tenth of scaling its frames
    afterwards; it must know the size when it opens the file.
    """
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getbuffer()) as stream:
        shown = frame_size(stream)
    reader = None
    if shown is None:  # not an MP4: ask its first frame
        reader = _open(name, file)
        first = _read(name, reader, [0])
        shown = (first.shape[1], first.shape[2])
    size = _fit(name, *shown, video)
    if size == shown:
        return reader or _open(name, file), size
    return _open(name, file, size), size


def _open(name: str | Path, file: str | io.BytesIO, size: tuple[int, int] | None = None) -> Any:
    import decord

    if isinstance(file, io.BytesIO):
        file.seek(0)
    height, width = size or (-1, -1)
    try:
        # One thread a reader: parallelism comes from worker processes, one video each. fault_tol: without it
        # decord hands out the last good frame again in place of each one it cannot decode; it counts a share
        # of the frames, and 0 would mean "any number".
        reader = decord.VideoReader(
            file, ctx=decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=FAULT_TOLERANCE
        )
    except _decord_errors() as error:
        raise VideoError(name, f"cannot be opened as video: {_reason(error)}") from error
    if len(reader) < 1:
        raise VideoError(name, "has no video frames")
    return reader


def _fit(name: str | Path, height: int, width: int, video: Video) -> tuple[int, int]:
    try:
        return fit_size(height, width, max_pixels=video.max_pixels, min_pixels=video.min_pixels)
    except ValueError as error:
        raise VideoError(name, str(error)) from error


def _read(name: str | Path, reader: Any, indices: list[int]) -> np.ndarray:
    try:
        return _grab(reader, indices)
    except _decord_errors() as error:
        where = f"frames {indices[0]} to {indices[-1]} of {len(reader)}"
        raise VideoError(name, f"{where} cannot be decoded: {_reason(error)}") from error


def _grab(reader: Any, indices: list[int]) -> np.ndarray:
    """(len(indices), H, W, 3) uint8."""
    import decord

    try:
        return reader.get_batch(indices).asnumpy()
    except decord.DECORDError as error:
        if "size must exactly match" not in str(error):
            raise
    # decord 0.6 takes the padding behind a narrow frame's rows for a fourth channel, and a batch of such
    # frames fails; alone they come with their rows padded.
    frames = []
    for index in indices:
        reader.seek_accurate(index)
        padded = reader.next().asnumpy()
        height, width = padded.shape[:2]
        frames.append(padded.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3))
    return np.stack(frames)


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 -> (size, 3) uint8, bicubic with anti-aliasing; the frame itself if it fits."""
    if frame.shape[:2] == size:
        return frame
    from PIL import Image

    image = Image.fromarray(frame)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _check_whole(name: str | Path, file: str | io.BytesIO, end_s: float) -> None:
    """Refuse a Matroska or WebM file whose frames end well before the length it declares.

    An MP4 that was cut off has no index, or an index that points behind its end: decord fails. Matroska has
    its frames in a row, and the half that is there decodes without a word.
    """
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getbuffer()[:4]) as start:
        head = start.read(4)
    if head != MATROSKA_MAGIC:
        return
    import av

    try:
        with av.open(
            io.BytesIO(file.getvalue()) if isinstance(file, io.BytesIO) else file, mode="r"
        ) as container:
            # Matroska counts to the end on its own clock; decord's times start at the first frame.
            longest = ((container.duration or 0) - max(0, container.start_time or 0)) / av.time_base
            others = len(container.streams) > len(container.streams.video)
    except av.FFmpegError:  # decord read it: no length to compare with
        return
    # Sound may end later than the picture, by less than half.
    if end_s < longest * (0.5 if others else 0.95) - 1.0:
        raise VideoError(
            name, f"is truncated: declares {longest:.1f} s, its last frame ends at {end_s:.1f} s"
        )


def _refuse_text(name: str | Path, file: str | io.BytesIO) -> None:
    """FFmpeg takes text for playlists, subtitles or network addresses; no container of video starts as text."""
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getbuffer()[:1024]) as stream:
        head = stream.read(1024)
    if head.startswith(PLAYLISTS) or NO_TEXT.isdisjoint(head):
        raise VideoError(name, "cannot be opened as video: it is text")


def _decord_errors() -> tuple[type[BaseException], ...]:
    import decord

    return (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, IndexError)


def _check_file(path: Path) -> None:
    if not path.exists():
        raise VideoError(path, "no such file")
    if not path.is_file():
        raise VideoError(path, "is not a regular file")
    if path.stat().st_size == 0:
        raise VideoError(path, "is empty (0 bytes)")


def _reason(error: BaseException) -> str:
    """The first telling line of a decord error: what follows is a C++ stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    if "cannot find video stream" in text:  # decord adds a number that differs from run to run
        return "it holds no video stream"
    # Its clock, source file and path in front differ from run to run and tell nothing.
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: *(\[[^\]]*\])?", "", text)
    return text.split("Check failed:")[-1].strip()[:300]
