"""Laws of advantages: TRL's formula, groups apart, no reward is no gradient, and off means off."""

from __future__ import annotations

import math
from statistics import fmean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.config import Policy
from appo.policy import RewardStream, settings_for
from appo.policy.advantages import group_advantages, informative_groups, stream_rewards, token_advantages
from appo.policy.overlong import soft_overlong_punishment

NAN = float("nan")
law = settings(max_examples=150, deadline=None, derandomize=True)
rewards_of_groups = st.integers(2, 6).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(
            st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.9, 1.0, NAN]), min_size=size, max_size=size),
            min_size=1,
            max_size=3,
        ),
    )
)


def slow_advantages(group: list[float]) -> list[float]:
    known = [reward for reward in group if not math.isnan(reward)]
    if len(set(known)) < 2:
        return [0.0] * len(group)
    mean, deviation = fmean(known), stdev(known)
    return [0.0 if math.isnan(r) else (r - mean) / (deviation + 1e-4) for r in group]


@law
@given(rewards_of_groups)
def test_match_slow_loops(case: tuple[int, list[list[float]]]) -> None:
    size, groups = case
    rewards = torch.tensor(groups, dtype=torch.float64).flatten()
    expected = torch.tensor([slow_advantages(group) for group in groups], dtype=torch.float64).flatten()
    # float64 rounding, divided by a deviation of at least 0.04
    torch.testing.assert_close(group_advantages(rewards, size), expected, atol=1e-12, rtol=0)
    informative = [len({r for r in group if not math.isnan(r)}) > 1 for group in groups]
    assert informative_groups(rewards, size).tolist() == informative


@law
@given(rewards_of_groups, st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_advantages(
    case: tuple[int, list[list[float]]], random: object
) -> None:
    size, groups = case
    order = list(range(size))
    random.shuffle(order)  # type: ignore[attr-defined]
    rewards = torch.tensor(groups, dtype=torch.float64)
    advantages = group_advantages(rewards.flatten(), size).view(-1, size)
    permuted = group_advantages(rewards[:, order].flatten(), size).view(-1, size)
    torch.testing.assert_close(permuted, advantages[:, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 7, 8])
@pytest.mark.parametrize("reward", [0.1, 0.9, 1 / 3])
def test_equal_rewards_give_exactly_nothing(size: int, reward: float) -> None:
    """In float32 the mean of seven times 0.1 is not 0.1; over 1e-4 the difference would train."""
    assert (group_advantages(torch.full((size,), reward), size) == 0).all()


def test_groups_are_whole() -> None:
    with pytest.raises(ValueError, match="in groups of 4"):
        group_advantages(torch.zeros(6), 4)


def test_a_reward_that_is_missing_is_left_out_and_all_missing_is_none() -> None:
    rewards = {"accuracy": torch.tensor([1.0, NAN, NAN]), "format": torch.tensor([1.0, 1.0, NAN])}
    total = stream_rewards(rewards, {"accuracy": 0.9, "format": 0.1})
    torch.testing.assert_close(total, torch.tensor([1.0, 0.1, NAN]), equal_nan=True)
    with pytest.raises(KeyError, match="'length': was not computed"):
        stream_rewards(rewards, {"length": 1.0})


def test_a_punishment_of_length_alone_is_no_reward() -> None:
    rewards = {"accuracy": torch.tensor([1.0, NAN]), "overlong": torch.tensor([-0.5, -1.0])}
    total = stream_rewards(rewards, {"accuracy": 0.9, "overlong": 1.0})
    torch.testing.assert_close(total, torch.tensor([0.4, NAN]), equal_nan=True)


def test_weights_of_one_change_nothing_exactly() -> None:
    streams = settings_for(Policy(algorithm="appo")).streams
    rewards = {"accuracy": torch.rand(8), "format": torch.rand(8)}
    plain = token_advantages(streams, rewards, 4, 5)
    assert torch.equal(token_advantages(streams, rewards, 4, 5, weights=torch.ones(8, 5)), plain)
    assert torch.equal(plain, plain[:, :1].expand(8, 5))
    weights = 1 + torch.rand(8, 5)
    assert torch.equal(token_advantages(streams, rewards, 4, 5, weights=weights), plain * weights)


def pa_grpo_case() -> tuple[tuple[RewardStream, ...], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    streams = settings_for(Policy(algorithm="pa_grpo")).streams
    rewards = {
        "perception": torch.tensor([1.0, 0.0, NAN, 1.0]),  # the judge was late for the third
        "accuracy": torch.tensor([1.0, 1.0, 0.0, 0.0]),
        "format": torch.ones(4),
    }
    observation = torch.zeros(4, 6, dtype=torch.bool)
    observation[:3, 1:3] = True  # the fourth is malformed: it has none
    return streams, rewards, {"observation": observation}


def test_pa_grpo_normalises_two_streams_apart() -> None:
    streams, rewards, spans = pa_grpo_case()
    advantages = token_advantages(streams, rewards, 4, 6, spans=spans)
    perception = torch.tensor(slow_advantages([1.0, 0.0, NAN, 1.0]))
    reasoning = torch.tensor(slow_advantages([1.0, 1.0, 0.1, 0.1]))
    for row in range(4):
        for token in range(6):
            expected = perception if spans["observation"][row, token] else reasoning
            assert advantages[row, token] == pytest.approx(float(expected[row]), abs=1e-5)
    # No verdict teaches nothing; a verdict of zero would have taught against it.
    assert (advantages[2, 1:3] == 0).all()
    assert advantages.isfinite().all()


def test_pa_grpo_combines_with_perception_weights_by_product() -> None:
    streams, rewards, spans = pa_grpo_case()
    weights = 1 + torch.rand(4, 6)
    plain = token_advantages(streams, rewards, 4, 6, spans=spans)
    assert torch.equal(
        token_advantages(streams, rewards, 4, 6, spans=spans, weights=weights), plain * weights
    )


def test_a_stream_of_equal_rewards_leaves_the_other_alone() -> None:
    streams, rewards, spans = pa_grpo_case()
    rewards["perception"] = torch.ones(4)
    advantages = token_advantages(streams, rewards, 4, 6, spans=spans)
    assert (advantages[spans["observation"]] == 0).all()
    assert (advantages[~spans["observation"]] != 0).all()


def test_a_token_belongs_to_the_first_stream_that_names_it() -> None:
    streams = (
        RewardStream("rest", {"c": 1.0}),
        RewardStream("first", {"a": 1.0}, tags=("x",)),
        RewardStream("second", {"b": 1.0}, tags=("x", "y")),
    )
    rewards = {name: torch.tensor([0.0, float(scale)]) for name, scale in (("a", 1), ("b", -1), ("c", 0))}
    spans = {"x": torch.tensor([[True, False, False]] * 2), "y": torch.tensor([[True, True, False]] * 2)}
    assert token_advantages(streams, rewards, 2, 3, spans=spans).sign().tolist() == [[-1, 1, 0], [1, -1, 0]]


def test_missing_spans_and_nan_weights_are_refused() -> None:
    streams, rewards, spans = pa_grpo_case()
    with pytest.raises(ValueError, match="spans: the perception advantage needs those of observation"):
        token_advantages(streams, rewards, 4, 6)
    with pytest.raises(ValueError, match="weights: have NaN"):
        token_advantages(streams, rewards, 4, 6, spans=spans, weights=torch.full((4, 6), NAN))


def test_all_rewards_missing_gives_zero_everywhere() -> None:
    streams = settings_for(Policy(algorithm="dapo")).streams
    nothing = {"accuracy": torch.full((4,), NAN), "format": torch.full((4,), NAN)}
    assert (token_advantages(streams, nothing, 2, 3) == 0).all()


def test_soft_overlong_punishment_is_eq_13_of_dapo() -> None:
    lengths = torch.tensor([1, 80, 81, 90, 99, 100, 120])
    found = soft_overlong_punishment(lengths, max_length=100, buffer=20)
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0]))
    assert (soft_overlong_punishment(lengths, max_length=100, buffer=0) == 0).all()
    with pytest.raises(ValueError, match=r"policy\.overlong_buffer=101"):
        soft_overlong_punishment(lengths, max_length=100, buffer=101)
