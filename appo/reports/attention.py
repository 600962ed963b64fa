"""Groups kept by a training -> where right and wrong completions look, and which group a figure shows.

Reads the lines of groups.jsonl. `frames` are temporal patches (two sampled frames each), as in APPO's own
terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

Group = dict[str, Any]
# Upper ends in seconds of Table A's bins after the first, which is exactly 0
_BIN_ENDS_S = (3.0, 6.0, 9.0, 12.0, 15.0)


def patch_times_s(group: Group) -> list[float]:
    """Seconds of each temporal patch; raw frames' times are averaged in pairs when twice as many are
    given.
    """
    num_patches = len(group["attention"][0][0]) if group.get("attention") else 0
    times = [float(t) for t in group.get("timestamps_s", ())]
    if len(times) == num_patches:
        return times
    if num_patches and len(times) == 2 * num_patches:
        return [fmean(times[2 * i : 2 * i + 2]) for i in range(num_patches)]
    return [float(i) for i in range(num_patches)]


def focused_frames(group: Group, *, k1: int, k2: int) -> list[list[int]]:
    """psi(i) of each completion: as the training wrote it, else from the attention (APPO, section 3.2)."""
    if group.get("psi"):
        return [list(frames) for frames in group["psi"]]
    frames: list[list[int]] = []
    for rows, tokens in zip(group["attention"], group["tokens"], strict=True):
        valid = np.asarray(rows, dtype=float)[: max(1, len(tokens))]
        scores = np.sort(valid, axis=0)[::-1][:k1].mean(axis=0)
        frames.append(sorted(np.argsort(-scores, kind="stable")[:k2].tolist()))
    return frames


def is_mixed(group: Group) -> bool:
    """Whether a group holds right and wrong completions, and attention to compare them by."""
    return bool(group.get("right") and group.get("wrong") and group.get("attention"))


@dataclass(frozen=True, slots=True)
class FocusDistance:
    """Table A: shares by distance between the mean times that right and wrong completions look at.

    shares: one for each bin of `paper.TABLE_A_BINS`, summing to 1; same_frames: share whose frames are the
    same set; groups: how many mixed groups were counted; mean_share_of_video: the distance over the video's
    length.
    """

    shares: tuple[float, ...]
    groups: int
    mean_s: float
    mean_share_of_video: float


def focus_distance(groups: Iterable[Group], *, k1: int, k2: int) -> FocusDistance | None:
    """None without a mixed group. A distance is 0 only where both sides look at the very same frames.

    The rest of the first bin's neighbour, (0, 3 s], also takes different frames whose mean times agree.
    """
    counts = [0] * (len(_BIN_ENDS_S) + 2)
    distances: list[float] = []
    relative: list[float] = []
    for group in groups:
        if not is_mixed(group):
            continue
        times, psi = patch_times_s(group), focused_frames(group, k1=k1, k2=k2)
        sides = [sorted({f for i in group[side] for f in psi[i]}) for side in ("right", "wrong")]
        means = [fmean(times[f] for i in group[side] for f in psi[i]) for side in ("right", "wrong")]
        distance = 0.0 if sides[0] == sides[1] else abs(means[0] - means[1])
        index = 0 if sides[0] == sides[1] else 1 + sum(distance > end for end in _BIN_ENDS_S)
        counts[index] += 1
        distances.append(distance)
        length = times[-1] - times[0]
        relative.append(distance / length if length > 0 else 0.0)
    if not distances:
        return None
    total = len(distances)
    return FocusDistance(tuple(c / total for c in counts), total, fmean(distances), fmean(relative))


def last_groups(groups: Sequence[Group]) -> list[Group]:
    """The groups of the last step that was kept."""
    last = max((int(g.get("step", 0)) for g in groups), default=0)
    return [g for g in groups if int(g.get("step", 0)) == last]


def choose_group(groups: Sequence[Group], sample_ids: Iterable[str] | None = None) -> Group | None:
    """The first mixed group with a known key frame, else the first mixed, else the first with attention.

    The order is the file's, nothing else is looked at: the figure is an example, not a selection of good
    ones.
    """
    wanted = None if sample_ids is None else set(sample_ids)
    kept = [g for g in groups if g.get("attention") and (wanted is None or g["sample_id"] in wanted)]
    for test in (lambda g: is_mixed(g) and g.get("key_frames"), is_mixed, lambda g: True):
        found = next((g for g in kept if test(g)), None)
        if found is not None:
            return found
    return None


def choose_completion(group: Group, side: str) -> int | None:
    """The first completion of a side, "right" or "wrong"; None when that side is empty."""
    return next(iter(group.get(side, ())), None)


def key_frame_attention(groups: Iterable[Group]) -> float | None:
    """Attention on the true key frames over the mean of all frames, averaged over completions; 1 is no
    preference.
    """
    ratios: list[float] = []
    for group in groups:
        if not group.get("key_frames") or not group.get("attention"):
            continue
        for rows, tokens in zip(group["attention"], group["tokens"], strict=True):
            valid = np.asarray(rows, dtype=float)[: max(1, len(tokens))]
            if valid.mean() > 0:
                ratios.append(float(valid[:, group["key_frames"]].mean() / valid.mean()))
    return fmean(ratios) if ratios else None
