"""KeyMoment settings and a seed -> real H.264 mp4 files and their questions: the demo's video set.

Every temporal patch (two frames) shows a disc in one of four colours. One patch, the key moment, carries a
bright cross; some others carry a fainter one. The question asks for the colour shown with the brightest cross,
so that only the key moment answers it and a policy that looks elsewhere is wrong. Stands before `assemble`,
which treats the files and records like any publisher's.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from appo.config import KeyMoment
from appo.data.schema import SPLITS, VideoSample

SOURCE = "key_moment"
QUESTION = "Which colour is shown with the brightest cross?"
# Of similar brightness, so that a white cross stands out equally on each.
COLOURS = {
    "red": (0.80, 0.15, 0.15),
    "green": (0.10, 0.60, 0.15),
    "blue": (0.20, 0.30, 0.90),
    "yellow": (0.65, 0.55, 0.05),
}
BACKGROUND = 0.35
FRAMES_PER_PATCH = 2
# One frame a second gives two seconds a temporal patch. transformers truncates seconds per patch to an integer
# when it makes positions: below one second all patches would share one temporal position.
FPS = 1


def make_key_moment(
    config: KeyMoment, *, seed: int, folder: Path, progress: bool = False
) -> list[VideoSample]:
    """Write the videos of all splits under `folder` and return their records, `video` relative to `folder`.

    Equal settings and seed give equal files (about 5 ms each on one core). What is shown: `draw_key_moment`.
    """
    for split in SPLITS:
        (folder / "videos" / split).mkdir(parents=True, exist_ok=True)
    drawn = draw_key_moment(config, seed=seed)
    total = config.easy_train + config.train + config.validation + config.test
    shown = track(drawn, description="key-moment videos", total=total, disable=not progress)
    return [_write_one(sample, frames, folder) for sample, frames in shown]


def draw_key_moment(config: KeyMoment, *, seed: int) -> Iterator[tuple[VideoSample, np.ndarray]]:
    """Each record with its frames, (F, H, W, 3) uint8, one a second, before any codec has seen them.

    A sample depends on seed, split and its number alone: asking for more of one split changes nothing in the others.
    `key_times` are seconds; `extra` holds what was drawn: `key_patch`, `colours` (one a temporal patch), `distractors`
    (patches with a faint cross) and `faint` (its strength).
    """
    plan = (
        ("warm_start", config.easy_train, config.easy_faint),
        ("train", config.train, config.faint),
        ("validation", config.validation, config.faint),
        ("test", config.test, config.faint),
    )
    for split, count, faint in plan:
        for index in range(count):
            yield _draw_one(config, seed, split, index, faint)


def _write_one(sample: VideoSample, frames: np.ndarray, folder: Path) -> VideoSample:
    data = _encode(frames)
    assert sample.video is not None  # as drawn
    path = folder / sample.video
    # Renamed whole, but not synced: after a crash of the machine the set is made again from its seed.
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.replace(path)
    return replace(sample, video_sha256=hashlib.sha256(data).hexdigest())


def _draw_one(
    config: KeyMoment, seed: int, split: str, index: int, faint: float
) -> tuple[VideoSample, np.ndarray]:
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    names = list(COLOURS)
    patches = config.num_frames // FRAMES_PER_PATCH
    # Each colour as often as the others (as far as the length allows): counting colours tells nothing.
    colours = [names[i] for i in rng.permutation(np.arange(patches) % len(names))]
    key, *others = (int(i) for i in rng.permutation(patches))
    distractors = sorted(others[: config.distractors])
    strengths = np.zeros(patches)
    strengths[distractors] = faint
    strengths[key] = 1.0
    frames = _draw([COLOURS[name] for name in colours], strengths, config, rng)
    extra: dict[str, Any] = {
        "key_patch": key,
        "colours": colours,
        "distractors": distractors,
        "faint": faint,
    }
    seconds = FRAMES_PER_PATCH / FPS
    sample = VideoSample(
        id=f"{SOURCE}/{split}/{index:05d}",
        source=SOURCE,
        problem_type="multiple choice",
        question=QUESTION,
        answer="ABCD"[names.index(colours[key])],
        options=tuple(names),
        video=f"videos/{split}/{index:05d}.mp4",
        split=split,
        duration_s=config.num_frames / FPS,
        key_times=((key * seconds, (key + 1) * seconds),),
        extra=extra,
    )
    return sample, frames


def _draw(
    colours: list[tuple[float, float, float]],
    strengths: np.ndarray,
    config: KeyMoment,
    rng: np.random.Generator,
) -> np.ndarray:
    """Frames (F, H, W, 3) uint8: disc, cross of the given strength (0 to 1) at its centre, noise everywhere."""
    size = config.size
    patches = len(colours)
    rows, columns = np.mgrid[:size, :size] - (size - 1) / 2
    # The disc moves a little from patch to patch, within what keeps it inside the frame.
    shift = rng.uniform(-0.06, 0.06, (2, patches, 1, 1)) * size
    y, x = rows - shift[0], columns - shift[1]
    disc = (x**2 + y**2 < (0.42 * size) ** 2)[..., None]
    arm, half_width = 0.28 * size, 0.08 * size
    cross = ((abs(x) < arm) & (abs(y) < half_width)) | ((abs(y) < arm) & (abs(x) < half_width))
    picture = np.where(disc, np.asarray(colours)[:, None, None, :], BACKGROUND)
    alpha = (cross * strengths[:, None, None])[..., None]
    picture = picture * (1 - alpha) + alpha
    frames = np.repeat(picture, FRAMES_PER_PATCH, axis=0).astype(np.float32)
    frames += rng.standard_normal(frames.shape, dtype=np.float32) * np.float32(config.noise)
    return np.rint(frames.clip(0, 1) * 255).astype(np.uint8)


def _encode(frames: np.ndarray) -> bytes:
    """Frames (F, H, W, 3) uint8 -> an mp4 file. One thread and a fixed quantiser, so that bytes repeat."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # Quantiser 20: colours and strengths of the crosses survive (tested); 10 would cost 40 % more bytes.
        stream = container.add_stream(
            "libx264", rate=FPS, options={"preset": "ultrafast", "qp": "20", "threads": "1"}
        )
        _, stream.height, stream.width, _ = frames.shape
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
