"""Time intervals in a response -> spans in seconds, and how well they cover the true ones.

Two measures under two names, because the paper's reward and NExT-GQA's official script differ: `set_overlap`
compares unions of intervals (APPO, supplement: "strictly computes intersection and union"); `span_scores`
takes one predicted span against each true one (NExT-GQA, code/TempGQA/eval_ground.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from appo.prompts import TIME
from appo.rewards.answers import extract_tag

Span = tuple[float, float]

# h:mm:ss, mm:ss or seconds; every repetition is bounded, so that a megabyte of digits is read in linear time.
_CLOCK = r"(?:[0-9]{1,6}:){0,2}[0-9]{1,9}(?:\.[0-9]{1,9})?"
_UNIT = r"\s{0,4}(?:seconds?|secs?|s)?\s{0,4}"
_INTERVAL = re.compile(
    rf"(?<![0-9.:])({_CLOCK}){_UNIT}(?:to|until|till|through|-|–|—|~)\s{{0,4}}({_CLOCK})(?![0-9:])",
    re.IGNORECASE | re.ASCII,
)


@dataclass(frozen=True, slots=True)
class SpanScores:
    """The best IoU and the best IoP (intersection over prediction) over the true spans, each on its own."""

    iou: float
    iop: float


def parse_spans(text: str) -> list[Span]:
    """The intervals named in a text, as written and in order; seconds.

    Reads `8.4 to 12.5`, `8.4-12.5`, `8 s to 12 s`, `0:08 to 0:12`, separated by commas, semicolons or words.
    An interval that ends before it starts is kept: what to do with it is the measure's decision.
    """
    return [(_seconds(match[1]), _seconds(match[2])) for match in _INTERVAL.finditer(text)]


def extract_spans(text: str) -> list[Span] | None:
    """The intervals inside a response's `<time>`; None when the tag is missing or holds no interval."""
    inside = extract_tag(text, TIME)
    return (parse_spans(inside) or None) if inside is not None else None


def merge_spans(spans: Sequence[Span], *, duration_s: float | None = None) -> list[Span]:
    """Sorted, overlaps merged, clipped to [0, duration_s], empty and reversed ones dropped."""
    end_of_video = float("inf") if duration_s is None else duration_s
    clipped = sorted((max(0.0, start), min(end, end_of_video)) for start, end in spans)
    merged: list[Span] = []
    for start, end in clipped:
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def set_overlap(
    predicted: Sequence[Span], true: Sequence[Span], *, duration_s: float | None = None
) -> SpanScores:
    """IoU and IoP of the two unions of intervals, in [0, 1]; 0 when either is empty.

    O(n log n) in the number of intervals.
    """
    left = merge_spans(predicted, duration_s=duration_s)
    right = merge_spans(true, duration_s=duration_s)
    length_left, length_right = (sum(end - start for start, end in side) for side in (left, right))
    inter, i, j = 0.0, 0, 0
    while i < len(left) and j < len(right):
        inter += max(0.0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] <= right[j][1]:
            i += 1
        else:
            j += 1
    if length_left <= 0 or length_right <= 0:
        return SpanScores(0.0, 0.0)
    # Rounding may leave the intersection a last bit above a length.
    return SpanScores(min(1.0, inter / (length_left + length_right - inter)), min(1.0, inter / length_left))


def set_iou(predicted: Sequence[Span], true: Sequence[Span], *, duration_s: float | None = None) -> float:
    """Intersection over union of two unions of intervals (APPO's temporal reward), in [0, 1]."""
    return set_overlap(predicted, true, duration_s=duration_s).iou


def span_scores(predicted: Span, true: Sequence[Span]) -> SpanScores:
    """One predicted span against each true one, as NExT-GQA's `get_tIoU` computes it; the maxima, from 0.

    IoU here is intersection over the hull of the two. A span of zero length scores IoU 0, and IoP 1 when it
    lies inside a true span: the published script does so; a benchmark that wants otherwise must say so. A span
    that ends before it starts scores 0.
    """
    best_iou = best_iop = 0.0
    start, end = predicted
    if end < start:
        # Two negative lengths would make an IoP of up to 1.
        return SpanScores(0.0, 0.0)
    for true_start, true_end in true:
        inter = min(end, true_end) - max(start, true_start)
        hull = max(end, true_end) - min(start, true_start)
        iou = inter / hull if hull > 0 else 0.0
        if end - start != 0:
            iop = inter / (end - start)
        else:
            iop = 1.0 if true_start <= start <= true_end else 0.0
        best_iou, best_iop = max(best_iou, iou), max(best_iop, iop)
    return SpanScores(min(1.0, best_iou), min(1.0, best_iop))


def _seconds(clock: str) -> float:
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total
