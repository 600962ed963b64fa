"""Which frames of a video are taken, and to what size they are scaled: arithmetic on times and sides, no files."""

from __future__ import annotations

import math

import numpy as np

from appo.config import Video

FACTOR = 28  # 14 pixels a patch, 2 x 2 patches merged into one visual token
TEMPORAL_PATCH = 2  # raw frames merged into one temporal patch
MAX_ASPECT_RATIO = 200  # as in Qwen's own image processor


def fit_size(
    height: int, width: int, *, max_pixels: int, min_pixels: int = FACTOR * FACTOR
) -> tuple[int, int]:
    """The (height, width) to scale to: multiples of 28, area in [min_pixels, max_pixels], ratio kept within
    rounding.

    Source: `smart_resize` of Qwen2-VL's image processor. A side never goes below 28, which for very long
    images may exceed the budget. Raises ValueError for a ratio above 200.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ValueError(f"is {width}x{height} pixels: aspect ratios above {MAX_ASPECT_RATIO} are refused")
    fitted_height = max(FACTOR, round(height / FACTOR) * FACTOR)
    fitted_width = max(FACTOR, round(width / FACTOR) * FACTOR)
    if fitted_height * fitted_width > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        fitted_height = max(FACTOR, math.floor(height / scale / FACTOR) * FACTOR)
        fitted_width = max(FACTOR, math.floor(width / scale / FACTOR) * FACTOR)
    elif fitted_height * fitted_width < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * scale / FACTOR) * FACTOR
        fitted_width = math.ceil(width * scale / FACTOR) * FACTOR
    return fitted_height, fitted_width


def choose_frames(starts_s: np.ndarray, duration_s: float, video: Video) -> tuple[int, ...]:
    """Indices of the frames to take; an even number of them, ascending.

    starts_s: (N,) presentation times from 0, ascending. With `num_frames` they are spread from the first
    frame to the last; with `fps` one every 1/fps seconds, or spread evenly where `max_frames` caps them. A
    file with fewer frames gives all it has; an odd count loses its last one, and a single frame is shown
    twice.
    """
    total = len(starts_s)
    capped = video.max_frames
    if video.num_frames is not None:
        wanted, times = min(video.num_frames, capped), None
    else:
        assert video.fps is not None
        wanted = max(TEMPORAL_PATCH, math.floor(duration_s * video.fps + 1e-6))
        times = np.arange(wanted) / video.fps if wanted <= min(capped, total) else None
        wanted = min(wanted, capped)
    if total == 1:
        return (0,) * TEMPORAL_PATCH
    count = max(TEMPORAL_PATCH, min(wanted, total) // TEMPORAL_PATCH * TEMPORAL_PATCH)
    if times is None:
        times = np.linspace(starts_s[0], starts_s[-1], count)
    return _nearest(starts_s, times[:count])


def _nearest(starts_s: np.ndarray, times: np.ndarray) -> tuple[int, ...]:
    """The frame nearest to each time, no frame twice; len(times) <= len(starts_s)."""
    total, count = len(starts_s), len(times)
    right = np.clip(np.searchsorted(starts_s, times), 1, total - 1)
    # 1e-9: a tie in exact arithmetic takes the earlier frame, whatever the rounding of the container's time
    # base
    nearest = np.where(times - starts_s[right - 1] <= starts_s[right] - times + 1e-9, right - 1, right)
    chosen, previous = [], -1
    for position, index in enumerate(nearest.tolist()):
        # Uneven times may name a frame twice: take the next one, but leave enough for those that follow.
        index = min(max(index, previous + 1), total - (count - position))
        chosen.append(index)
        previous = index
    return tuple(chosen)


def sampled_fps(timestamps_s: np.ndarray, duration_s: float) -> float:
    """Sampled frames per second: from their mean distance, or from the duration where all show one moment."""
    spread = float(timestamps_s[-1] - timestamps_s[0])
    if spread > 0:
        return (len(timestamps_s) - 1) / spread
    return len(timestamps_s) / duration_s if duration_s > 0 else float(len(timestamps_s))
