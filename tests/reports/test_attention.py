"""Table A's distances on groups whose answer can be counted by hand."""

from __future__ import annotations

import pytest

from appo.reports.attention import (
    choose_group,
    focus_distance,
    focused_frames,
    key_frame_attention,
    patch_times_s,
)


def group(psi: list[list[int]], right: list[int], *, frames: int = 10, **more: object) -> dict:
    attention = [[[0.5 if t in chosen else 0.1 for t in range(frames)]] * 3 for chosen in psi]
    return {
        "sample_id": "s",
        "tokens": [["a", "b", "c"]] * len(psi),
        "attention": attention,
        "psi": psi,
        "right": right,
        "wrong": [i for i in range(len(psi)) if i not in right],
        "timestamps_s": [2.0 * t for t in range(frames)],
        **more,
    }


def test_bins_of_table_a() -> None:
    groups = [
        group([[1], [1]], [0]),  # the same frame: 0 s
        group([[1], [2]], [0]),  # 2 s: 0-3
        group([[0], [9]], [0]),  # 18 s: > 15
        group([[0, 4], [2]], [0]),  # other frames, same mean time: not the 0 s bin
        group([[3], [4]], []),  # nothing right: not counted
    ]
    found = focus_distance(groups, k1=2, k2=1)
    assert found is not None
    assert found.groups == 4
    assert found.shares == (0.25, 0.5, 0.0, 0.0, 0.0, 0.0, 0.25)
    assert found.mean_s == pytest.approx((0 + 2 + 18 + 0) / 4)
    assert found.mean_share_of_video == pytest.approx((2 / 18 + 1) / 4)


def test_frames_from_attention_agree_with_those_written_down() -> None:
    made = group([[2], [5]], [0])
    written = focused_frames(made, k1=2, k2=1)
    assert focused_frames({**made, "psi": []}, k1=2, k2=1) == written == [[2], [5]]


def test_times_of_raw_frames_are_averaged_in_pairs() -> None:
    made = group([[0]], [0], frames=2)
    assert patch_times_s({**made, "timestamps_s": [0.0, 1.0, 2.0, 3.0]}) == [0.5, 2.5]
    assert patch_times_s({**made, "timestamps_s": []}) == [0.0, 1.0]


def test_the_example_is_the_first_that_qualifies() -> None:
    plain, mixed = group([[1], [1]], [0, 1]), group([[1], [2]], [0])
    keyed = {**group([[1], [2]], [0]), "key_frames": [1]}
    assert choose_group([plain, mixed, keyed, keyed]) is keyed
    assert choose_group([plain, mixed]) is mixed
    assert choose_group([plain]) is plain
    assert choose_group([]) is None


def test_preference_for_the_key_frame() -> None:
    made = {**group([[1]], [0]), "key_frames": [1]}
    assert key_frame_attention([made]) == pytest.approx(0.5 / ((0.5 + 9 * 0.1) / 10))
    assert key_frame_attention([group([[1]], [0])]) is None
