"""The weights against ten cases made by a slow float64 program that shares no line with this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from appo.perception import perception_weights, perception_weights_from_hidden

CASES = json.loads((Path(__file__).parents[1] / "data/perception/appo_golden.json").read_text())
SETTINGS = ("k1", "k2", "k3", "max_weight", "tau")


@pytest.mark.parametrize("strategy", ["hard", "soft", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['seed']}")
def test_both_doors_match_the_golden_case(case: dict[str, Any], strategy: str) -> None:
    settings = {name: case[name] for name in SETTINGS} | {"strategy": strategy}
    inputs = [
        torch.tensor(case["attention"], dtype=torch.float64),
        torch.tensor(case["completion_lengths"]),
        torch.tensor(case["accuracy_rewards"]),
    ]
    logits = torch.tensor(case["logits"], dtype=torch.float64)
    expected = torch.tensor(case["expected"][strategy]["weights"], dtype=torch.float64)

    weights, frames = perception_weights(*inputs, logits, **settings)

    assert frames == case["expected"][strategy]["frames"]
    # The file gives nine decimals; the result is float32.
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    # An identity head makes logits of the hidden states; a budget of 2 kB makes many chunks and blocks of
    # them.
    head = torch.eye(logits.shape[-1], dtype=torch.float64)
    from_hidden = perception_weights_from_hidden(*inputs, logits, head, chunk_mib=0.002, **settings)
    assert list(from_hidden.frames) == frames
    torch.testing.assert_close(from_hidden.weights.double(), weights, atol=1e-6, rtol=0)


def test_lists_are_taken_as_they_come() -> None:
    case = CASES[2]
    settings = {name: case[name] for name in SETTINGS}
    weights, frames = perception_weights(
        case["attention"], case["completion_lengths"], case["accuracy_rewards"], case["logits"], **settings
    )
    assert frames == case["expected"]["soft"]["frames"]
    torch.testing.assert_close(weights, torch.tensor(case["expected"]["soft"]["weights"]), atol=1e-6, rtol=0)
