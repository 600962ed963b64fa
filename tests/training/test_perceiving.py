"""What a training step says about its token weights."""

from __future__ import annotations

import pytest
import torch

from appo.config import load_recipe
from appo.training.perceiving import group_weights, weight_histogram


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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_known_log_probabilities_save_a_pass_and_change_no_weight(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The normaliser of softmax(logits / temperature), from the one token whose log-probability is known."""
    from appo.training import perceiving

    recipe = load_recipe("demo", [f"policy.temperature={temperature}"])
    generator = torch.Generator().manual_seed(0)
    size, length, frames, hidden, words = 6, 9, 5, 16, 40
    head = torch.randn(words, hidden, generator=generator) * 0.5
    bias = torch.randn(words, generator=generator)
    view = {
        "attention": torch.rand(size, length, frames, generator=generator),
        "hidden": torch.randn(size, length, hidden, generator=generator),
        "lengths": torch.full((size,), length),
        "accuracy": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
        "frames": torch.full((size,), frames),
    }
    tokens = torch.randint(0, words, (size, length), generator=generator)
    logps = ((view["hidden"] @ head.T + bias) / temperature).log_softmax(dim=-1)
    known = view | {"tokens": tokens, "logps": logps.gather(2, tokens[..., None])[..., 0]}

    given: list[torch.Tensor | None] = []
    weigh = perceiving.weights_from_rows

    def watching(*args, log_normalizer, **kwargs):
        given.append(log_normalizer)
        return weigh(*args, log_normalizer=log_normalizer, **kwargs)

    monkeypatch.setattr(perceiving, "weights_from_rows", watching)
    expected, found = (group_weights(one, recipe, head, bias).weights for one in (view, known))
    assert given[0] is None
    assert given[1] is not None
    assert float(expected.max()) > 1.2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
