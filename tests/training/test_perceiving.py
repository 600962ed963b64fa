"""What a training step says about its token weights."""

from __future__ import annotations

import pytest
import torch

from appo.training.perceiving import weight_histogram


def test_bins_depend_on_the_setting_alone() -> None:
    names, shares = weight_histogram(torch.tensor([1.0, 1.0, 1.01, 1.34, 1.7]), max_weight=1.7)
    assert names[:3] == ["share_1.00", "share_1.00_to_1.07", "share_1.07_to_1.14"]
    assert names[-1] == "share_1.63_to_1.70"
    found = {name: share for name, share in zip(names, shares.tolist(), strict=True) if share}
    assert found == pytest.approx(
        {"share_1.00": 0.4, "share_1.00_to_1.07": 0.2, "share_1.28_to_1.35": 0.2, "share_1.63_to_1.70": 0.2}
    )
    assert weight_histogram(torch.ones(4), max_weight=1.7)[0] == names


def test_without_room_above_one_there_is_one_bin() -> None:
    names, shares = weight_histogram(torch.ones(3), max_weight=1.0)
    assert (names, shares.tolist()) == (["share_1.00"], [1.0])
