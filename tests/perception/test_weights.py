"""Laws of APPO's token weights: equal to slow loops, blind to padding and order, defined at every edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.perception import (
    WeightSettings,
    perception_weights,
    perception_weights_from_hidden,
    select,
    weights_from_logits,
    weights_from_rows,
)
from tests.perception.memory import peak_extra_bytes
from tests.perception.reference import random_group, slow_weights

groups = st.builds(
    random_group,
    st.integers(0, 2**20),
    completions=st.integers(2, 5),
    tokens=st.integers(1, 9),
    frames=st.integers(1, 6),
    vocabulary=st.integers(2, 9),
    ties=st.booleans(),
)
choices = st.fixed_dictionaries(
    {
        "k1": st.integers(1, 10),
        "k2": st.integers(1, 6),
        "k3": st.integers(1, 10),
        "max_weight": st.sampled_from([1.0, 1.3, 1.7, 4.0]),
        "strategy": st.sampled_from(["hard", "soft", "all"]),
        "fallback": st.sampled_from(["none", "all"]),
        "divergence": st.sampled_from(["kl", "released"]),
        "temperature": st.sampled_from([0.5, 1.0, 1.6]),
    }
)
law = settings(max_examples=150, deadline=None, derandomize=True)
SOME: dict[str, Any] = {"k1": 3, "k2": 2, "k3": 4, "max_weight": 1.7}


def hidden_door(group: dict[str, Any], chosen: dict[str, Any], **more: Any) -> Any:
    """The second door on logits that are hidden states times an identity head, in many small chunks."""
    inputs = {name: value for name, value in group.items() if name != "logits"}
    logits = group["logits"]
    head = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return perception_weights_from_hidden(**inputs, hidden=logits, head_weight=head, **chosen, **more)


@law
@given(groups, choices)
def test_both_doors_match_slow_loops(group: dict[str, Any], chosen: dict[str, Any]) -> None:
    expected, frames = slow_weights(*group.values(), **chosen)
    weights, found = perception_weights(**group, **chosen)
    second = hidden_door(group, chosen, chunk_mib=0.0005)
    assert found == list(second.frames) == frames
    # The answer is float32: its rounding at 4, the largest weight tried, is 2.4e-7.
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(second.weights.double(), weights, atol=1e-6, rtol=0)


@law
@given(groups, choices, st.randoms(use_true_random=False))
def test_permuting_completions_permutes_their_weights(
    group: dict[str, Any], chosen: dict[str, Any], random: Any
) -> None:
    order = list(range(len(group["completion_lengths"])))
    random.shuffle(order)
    weights, frames = perception_weights(**group, **chosen)
    permuted, same_frames = perception_weights(**{name: x[order] for name, x in group.items()}, **chosen)
    assert same_frames == frames
    # Sums over the group run in another order: float64 rounding, stretched by at most 1e9 where D hardly
    # varies.
    torch.testing.assert_close(permuted, weights[order], atol=1e-6, rtol=0)


@law
@given(groups, choices, st.integers(1, 7))
def test_padding_changes_nothing(group: dict[str, Any], chosen: dict[str, Any], extra: int) -> None:
    weights, frames = perception_weights(**group, **chosen)
    padded = dict(group)
    tokens = group["attention"].shape[1]
    for name in ("attention", "logits"):
        padded[name] = torch.nn.functional.pad(group[name], (0, 0, 0, extra), value=torch.nan)
        for i, length in enumerate(group["completion_lengths"]):
            padded[name][i, length:] = torch.nan  # whatever stands there is not read
    wide, same_frames = perception_weights(**padded, **chosen)
    second = hidden_door(padded, chosen)
    assert same_frames == frames
    assert torch.equal(wide[:, :tokens], weights)
    assert (wide[:, tokens:] == 1).all()
    torch.testing.assert_close(second.weights.double(), wide, atol=1e-6, rtol=0)


@law
@given(groups, choices)
def test_weights_lie_between_one_and_the_largest(group: dict[str, Any], chosen: dict[str, Any]) -> None:
    weights, _ = perception_weights(**group, **chosen)
    assert (weights >= 1).all()
    assert (weights <= chosen["max_weight"] + 1e-6).all()
    for i, length in enumerate(group["completion_lengths"]):
        assert (weights[i, length:] == 1).all()


@pytest.mark.parametrize("kind", ["kl", "released"])
def test_doors_agree_in_float32_with_a_real_head(kind: str) -> None:
    group = random_group(5, completions=8, tokens=40, frames=6, vocabulary=2, ties=False)
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(8, 40, 64, generator=rng)
    head, bias = torch.randn(1000, 64, generator=rng) / 8, torch.randn(1000, generator=rng)
    logits = hidden @ head.T + bias
    inputs = [group[name] for name in ("attention", "completion_lengths", "accuracy_rewards")]
    chosen = SOME | {"k3": 12, "temperature": 0.7, "divergence": kind}
    first, _ = perception_weights(*inputs, logits, **chosen)
    second = perception_weights_from_hidden(*inputs, hidden, head, bias, **chosen, chunk_mib=0.1)
    normalizer = torch.logsumexp(logits / 0.7, dim=-1)
    third = perception_weights_from_hidden(
        *inputs, hidden, head, bias, **chosen, log_normalizer=normalizer, chunk_mib=0.1
    )
    assert not second.degenerate
    torch.testing.assert_close(second.weights.double(), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(third.weights.double(), first, atol=1e-5, rtol=0)


def test_bf16_rows_are_multiplied_without_further_rounding() -> None:
    group = random_group(6, completions=4, tokens=20, frames=4, vocabulary=2, ties=False)
    rng = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 20, 32, generator=rng).bfloat16()
    head = (torch.randn(300, 32, generator=rng) / 4).bfloat16()
    inputs = [group[name] for name in ("attention", "completion_lengths", "accuracy_rewards")]
    exact, _ = perception_weights(*inputs, hidden.double() @ head.double().T, **SOME)
    found = perception_weights_from_hidden(*inputs, hidden, head, **SOME)
    torch.testing.assert_close(found.weights.double(), exact, atol=1e-5, rtol=0)


def test_rows_gathered_from_two_devices_give_the_same_weights() -> None:
    group = random_group(7, completions=6, tokens=15, frames=5, vocabulary=11, ties=False)
    logits = group.pop("logits")
    chosen = WeightSettings(**SOME)
    selection = select(**group, settings=chosen)
    whole = weights_from_logits(selection, group["completion_lengths"], logits, chosen)
    devices = [range(2), range(2, 6)]
    gathered = torch.cat([logits[i, selection.rows_of(i)] for device in devices for i in device])
    head = torch.eye(11, dtype=torch.float64)
    parts = weights_from_rows(selection, group["completion_lengths"], gathered, head, settings=chosen)
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="rows: the selection chose"):
        weights_from_rows(selection, group["completion_lengths"], gathered[1:], head, settings=chosen)


def test_no_gradient_flows_through_a_weight() -> None:
    group = random_group(8, completions=3, tokens=5, frames=3, vocabulary=4, ties=False)
    group["attention"].requires_grad_()
    group["logits"].requires_grad_()
    weights, _ = perception_weights(**group, **SOME)
    assert not weights.requires_grad
    head = torch.eye(4, dtype=torch.float64, requires_grad=True)
    inputs = {name: value for name, value in group.items() if name != "logits"}
    second = perception_weights_from_hidden(**inputs, hidden=group["logits"], head_weight=head, **SOME)
    assert not second.weights.requires_grad


@pytest.mark.parametrize("rewards", [[0.0] * 4, [1.0] * 4, [float("nan")] * 4, [1.0, float("nan"), 0.0, 0.0]])
@pytest.mark.parametrize("strategy", ["hard", "soft", "all"])
def test_every_mix_of_rewards_is_defined(rewards: list[float], strategy: str) -> None:
    group = random_group(9, completions=4, tokens=6, frames=4, vocabulary=5, ties=False)
    group["accuracy_rewards"] = torch.tensor(rewards, dtype=torch.float64)
    weights, frames = perception_weights(**group, **SOME, strategy=strategy)
    expected, expected_frames = slow_weights(*group.values(), **SOME, strategy=strategy)
    assert frames == expected_frames
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_ungraded_completion_is_neither_right_nor_wrong() -> None:
    group = random_group(10, completions=3, tokens=6, frames=4, vocabulary=5, ties=False)
    group["accuracy_rewards"] = torch.tensor([1.0, torch.nan, 0.0], dtype=torch.float64)
    found = hidden_door(group, SOME | {"strategy": "all"})
    assert (found.right, found.wrong) == ((0,), (2,))
    assert set(found.frames) == set(found.psi[0]) | set(found.psi[2])


def test_without_a_right_completion_every_weight_is_one_unless_the_fallback_is_on() -> None:
    group = random_group(11, completions=4, tokens=6, frames=4, vocabulary=5, ties=False)
    group["accuracy_rewards"].zero_()
    for strategy in ("hard", "soft"):
        found = hidden_door(group, SOME | {"strategy": strategy})
        assert found.frames == ()
        assert found.degenerate
        assert found.perception_share == 0
        assert (found.weights == 1).all()
        back = hidden_door(group, SOME | {"strategy": strategy, "fallback": "all"})
        assert set(back.frames) == {frame for psi in back.psi for frame in psi}
        assert not back.degenerate


@pytest.mark.parametrize("kind", ["kl", "released"])
@pytest.mark.parametrize(
    ("tokens", "frames"), [(1, 3), (6, 1), (1, 1), (6, 0)], ids=["one-token", "T=1", "both", "no-video"]
)
def test_smallest_groups_are_defined(tokens: int, frames: int, kind: str) -> None:
    group = random_group(12, completions=4, tokens=tokens, frames=frames, vocabulary=5, ties=False)
    group["accuracy_rewards"][0] = 1
    for chosen in (SOME | {"divergence": kind}, SOME | {"divergence": kind, "max_weight": 1.0}):
        weights, found = perception_weights(**group, **chosen)
        assert weights.isfinite().all()
        assert (hidden_door(group, chosen).weights == weights).all()
        assert len(found) == min(frames, len(found))
        if tokens == 1 or frames == 0:  # one rank has nothing to be compared with
            assert (weights == 1).all()


def test_all_completions_truncated_at_the_full_length_are_like_any_other() -> None:
    group = random_group(13, completions=4, tokens=7, frames=3, vocabulary=5, ties=False)
    group["completion_lengths"].fill_(7)
    weights, _ = perception_weights(**group, **SOME)
    expected, _ = slow_weights(*group.values(), **SOME)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_an_empty_completion_takes_no_part() -> None:
    group = random_group(14, completions=3, tokens=6, frames=4, vocabulary=5, ties=False)
    group["completion_lengths"] = torch.tensor([6, 0, 5])
    group["accuracy_rewards"] = torch.tensor([1.0, 1.0, 0.0])
    two = {name: value[[0, 2]] for name, value in group.items()}
    weights, frames = perception_weights(**group, **SOME)
    without, same = perception_weights(**two, **SOME)
    assert frames == same
    assert torch.equal(weights[[0, 2]], without)
    assert (weights[1] == 1).all()


def test_identical_completions_disagree_nowhere() -> None:
    group = random_group(15, completions=4, tokens=8, frames=4, vocabulary=50, ties=False)
    group = {name: value[:1].expand(4, *value.shape[1:]).clone() for name, value in group.items()}
    group["accuracy_rewards"].fill_(1)
    # Rows of one product differ by rounding with their place in it: as large as float32 makes it.
    group["logits"] = (group["logits"] + 1e-6 * torch.randn_like(group["logits"])).float()
    for chosen in (SOME, SOME | {"divergence": "released"}):
        found = hidden_door(group, chosen)
        assert found.degenerate
        assert (found.weights == 1).all()


def test_forbidden_tokens_of_the_vocabulary_are_harmless() -> None:
    group = random_group(16, completions=3, tokens=6, frames=4, vocabulary=8, ties=False)
    group["accuracy_rewards"][0] = 1
    plain, _ = perception_weights(**group, **SOME)
    group["logits"] = torch.nn.functional.pad(group["logits"], (0, 3), value=-torch.inf)
    padded, _ = perception_weights(**group, **SOME)
    torch.testing.assert_close(padded, plain, atol=1e-9, rtol=0)
    for kind in ("kl", "released"):
        group["logits"][0, :, 2] = -torch.inf  # one completion's masked logit
        assert perception_weights(**group, **SOME, divergence=kind)[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k1": 0}, "perception.k1=0"),
        ({"max_weight": 0.5}, "perception.max_weight=0.5"),
        ({"strategy": "softer"}, "perception.strategy='softer'"),
        ({"temperature": 0.0}, "policy.temperature=0.0"),
        ({"completion_lengths": torch.tensor([3, 7])}, "between 0 and 6"),
        ({"completion_lengths": torch.tensor([3])}, "completion_lengths: must be"),
        ({"attention": torch.full((2, 6, 3), torch.nan)}, "attention: has NaN"),
        ({"logits": torch.zeros(2, 5, 4)}, "logits: must be"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    group = random_group(17, completions=2, tokens=6, frames=3, vocabulary=4, ties=False)
    with pytest.raises(ValueError, match=message):
        perception_weights(**(group | SOME | change))


@pytest.mark.parametrize("kind", ["kl", "released"])
def test_second_door_stays_under_64_mb_at_the_papers_size(kind: str) -> None:
    completions, tokens, hidden_size, frames = 8, 512, 2048, 10
    # The most rows there can be: every one of the ten frames is looked at by other tokens, so that all are
    # chosen.
    attention = torch.rand(completions, tokens, frames) * 1e-3
    for frame in range(frames):
        attention[:, (torch.arange(64) + 51 * frame) % tokens, frame] += 1
    hidden = torch.randn(completions, tokens, hidden_size)
    # Chunks of the vocabulary follow one another, so its size does not matter once there are several of them.
    head = torch.randn(700, hidden_size) / 50
    lengths, rewards = torch.full((completions,), tokens), torch.ones(completions)
    found = []

    def call() -> None:
        chosen = {"k1": 15, "k2": frames, "k3": 64, "max_weight": 1.7, "divergence": kind}
        found.append(perception_weights_from_hidden(attention, lengths, rewards, hidden, head, **chosen))

    assert peak_extra_bytes(call) < 64e6
    assert len(found[0].frames) == frames
    assert found[0].perception_share == 1
