"""The promotion rule as laws, and the registry's aliases in a real store."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.config import Recipe
from appo.tracking.champion import ChampionError, Contender, decide, open_registry, unchanged

scores = st.lists(st.floats(0, 1), min_size=1, max_size=6).map(tuple)


def contender(*values: float, uri: str = "new", manifest: str = "m") -> Contender:
    return Contender(uri, values, manifest)


def test_the_first_one_is_promoted() -> None:
    assert decide(contender(0.1), None, margin=0.5).promote


def test_margin_and_noise_are_both_asked_for() -> None:
    """Deviation .02 over 4 seeds each: standard error .02 * sqrt(1/4 + 1/4) = .01414; needed .01 + 2 *
    .01414.
    """
    base = (0.48, 0.50, 0.50, 0.52)  # deviation sqrt(.0008 / 3) = .01633
    error = (0.0008 / 3 * (1 / 4 + 1 / 4)) ** 0.5
    needed = 0.01 + 2 * error
    for gain, promoted in ((needed - 1e-6, False), (needed + 1e-6, True)):
        better = tuple(value + gain for value in base)
        decision = decide(contender(*better), contender(*base), margin=0.01)
        assert decision.promote is promoted
        assert decision.needed == pytest.approx(needed, abs=1e-12)


def test_one_seed_on_each_side_asks_only_for_the_margin_and_says_so() -> None:
    decision = decide(contender(0.52), contender(0.5), margin=0.01)
    assert decision.promote
    assert "nothing about noise" in decision.reason


def test_a_single_champion_borrows_the_challengers_deviation() -> None:
    decision = decide(contender(0.50, 0.60), contender(0.5), margin=0.0)
    deviation = 0.1 / 2**0.5
    assert decision.noise == pytest.approx((deviation**2 / 2 + deviation**2) ** 0.5, abs=1e-12)
    assert not decision.promote


@given(scores, scores, st.floats(0, 0.2))
@settings(max_examples=100, deadline=None)
def test_never_both_ways_and_never_against_the_mean(
    a: tuple[float, ...], b: tuple[float, ...], margin: float
) -> None:
    forth = decide(contender(*a), contender(*b), margin=margin)
    back = decide(contender(*b), contender(*a), margin=margin)
    assert not (forth.promote and back.promote)
    assert not forth.promote or sum(a) / len(a) > sum(b) / len(b) + margin - 1e-12


def test_refusals() -> None:
    with pytest.raises(ValueError, match="same one"):
        decide(contender(0.5), contender(0.5, manifest="other"), margin=0.0)
    with pytest.raises(ValueError, match="margin"):
        decide(contender(0.5), None, margin=-0.1)
    with pytest.raises(ValueError, match="scores"):
        decide(contender(), None, margin=0.0)


def test_aliases_move_nothing_is_deleted_and_rollback_goes_back(recipe: Recipe, tmp_path: Path) -> None:
    registry = open_registry(recipe, tmp_path)
    assert registry.champion() is None
    assert "no champion yet" in registry.describe()
    with pytest.raises(ChampionError, match="no previous"):
        registry.roll_back()

    first, second, third = (
        contender(0.5, uri="one"),
        contender(0.6, uri="two", manifest="n"),
        contender(0.6, uri="three"),
    )
    registry.record(decide(first, None, margin=0.0), first)
    assert unchanged(registry.champion(), "m")
    assert not unchanged(registry.champion(), "n")
    promoted = decide(second, contender(0.5, uri="one", manifest="n"), margin=0.01)
    registry.record(promoted, second)
    registry.record(promoted, second)  # a retried step: still one version
    refused = decide(third, contender(0.6, uri="two"), margin=0.01)
    assert not refused.promote
    registry.record(refused, third)

    champion, previous = registry.champion(), registry.previous()
    assert champion is not None
    assert previous is not None
    assert (champion.uri, previous.uri) == ("two", "one")
    assert {v.uri for v in registry.versions()} == {"one", "two", "three"}
    assert "promoted" in champion.tags["appo.decision"]
    assert "kept the champion" in registry.describe()

    assert registry.roll_back("answers were worse in use").uri == "one"
    assert registry.previous().uri == "two"  # type: ignore[union-attr]
    assert "answers were worse in use" in registry.describe()
    assert registry.roll_back().uri == "two"
