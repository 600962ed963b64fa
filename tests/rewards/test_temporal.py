"""Intervals: how they are read, and the two measures of overlap on hand-made cases and by their laws."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.rewards.temporal import (
    extract_spans,
    merge_spans,
    parse_spans,
    set_iou,
    set_overlap,
    span_scores,
)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("8.4 to 12.5, 25 to 30.2", [(8.4, 12.5), (25.0, 30.2)]),
        ("8.4-12.5; 25 - 30.2", [(8.4, 12.5), (25.0, 30.2)]),
        ("8 s to 12 seconds and 3 s - 4 s", [(8.0, 12.0), (3.0, 4.0)]),
        ("0:08 to 1:02.5", [(8.0, 62.5)]),
        ("1:00:00 to 1:00:10", [(3600.0, 3610.0)]),
        ("5 to 3", [(5.0, 3.0)]),
        ("from 7 until 9", [(7.0, 9.0)]),
        ("12.5", []),
        ("", []),
        ("no time", []),
    ],
)
def test_intervals_are_read(text, spans):
    assert parse_spans(text) == spans


def test_spans_come_from_the_time_tag_alone():
    assert extract_spans("<think>1 to 2</think><answer>A</answer><time>3 to 4</time>") == [(3.0, 4.0)]
    assert extract_spans("<think>1 to 2</think><answer>A</answer> 3 to 4") is None
    assert extract_spans("<answer>A</answer><time> unknown </time>") is None


def test_merging_sorts_clips_and_drops():
    assert merge_spans([(8, 9), (1, 3), (2, 4), (6, 5), (7, 7), (9, 40)], duration_s=10) == [(1, 4), (8, 10)]


@pytest.mark.parametrize(
    ("predicted", "true", "iou"),
    [
        ([(0, 10)], [(0, 10)], 1.0),
        ([(0, 5), (5, 10)], [(0, 10)], 1.0),
        ([(0, 5)], [(5, 10)], 0.0),
        ([(0, 4), (6, 10)], [(2, 8)], 4 / 10),
        ([], [(0, 1)], 0.0),
        ([(3, 3)], [(0, 10)], 0.0),
    ],
)
def test_set_iou_by_hand(predicted, true, iou):
    assert set_iou(predicted, true) == pytest.approx(iou, abs=1e-12)


def test_span_scores_follow_the_published_script():
    # two true spans: IoU is best with the first, IoP with the second, each on its own
    scores = span_scores((4.0, 12.0), [(2.0, 10.0), (3.0, 20.0)])
    assert scores.iou == pytest.approx(6 / 10)
    assert scores.iop == pytest.approx(1.0)
    # never a merged set: (0,4) against (0,1) and (3,4) is 1/4 of the hull, not 2/4
    assert span_scores((0.0, 4.0), [(0.0, 1.0), (3.0, 4.0)]).iou == pytest.approx(0.25)
    # zero length: IoU 0, IoP 1 inside
    assert span_scores((5.0, 5.0), [(4.0, 6.0)]) == type(scores)(0.0, 1.0)
    assert span_scores((7.0, 7.0), [(4.0, 6.0)]) == type(scores)(0.0, 0.0)
    # apart: negative intersections count as nothing
    assert span_scores((0.0, 1.0), [(4.0, 6.0)]) == type(scores)(0.0, 0.0)


seconds = st.integers(0, 40).map(float)
interval_lists = st.lists(st.tuples(seconds, seconds), max_size=5)


@given(interval_lists, interval_lists)
def test_set_overlap_equals_counting_seconds(predicted, true):
    """On whole seconds, unions of intervals are sets of unit cells: count them. Exact but for a division."""
    left = {cell for start, end in predicted for cell in range(int(start), int(end))}
    right = {cell for start, end in true for cell in range(int(start), int(end))}
    scores = set_overlap(predicted, true)
    both = len(left & right)
    assert scores.iou == pytest.approx(both / len(left | right) if left and right else 0.0, abs=1e-12)
    assert scores.iop == pytest.approx(both / len(left) if left and right else 0.0, abs=1e-12)
    assert set_overlap(true, predicted).iou == pytest.approx(scores.iou, abs=1e-12)


@given(st.tuples(seconds, seconds), interval_lists)
def test_span_scores_never_leave_the_unit_interval(predicted, true):
    scores = span_scores(predicted, true)
    assert 0 <= scores.iou <= 1
    assert 0 <= scores.iop <= 1
