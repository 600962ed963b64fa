"""Statistics against slow loops, scipy, and cases whose answer is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.reports.statistics import (
    SEEDS_FOR_CLAIM,
    band,
    bootstrap_interval,
    exact_sign_flip_p,
    paired_difference,
    sign_flip_p,
    summarise,
)


def test_one_seed_has_no_deviation_and_missing_ones_do_not_count() -> None:
    assert summarise([]) is summarise([None, math.nan]) is None
    one = summarise([0.5, None])
    assert one is not None
    assert (one.mean, one.std, one.n) == (0.5, None, 1)
    three = summarise([0.1, 0.2, 0.6])
    assert three is not None
    assert three.std == pytest.approx(np.std([0.1, 0.2, 0.6], ddof=1), abs=1e-12)


def test_random_flips_agree_with_all_flips() -> None:
    """12 differences have 4096 patterns; 20,000 random ones estimate p to +-.01 (3 standard errors)."""
    differences = np.random.default_rng(3).normal(0.3, 1.0, 12)
    exact = exact_sign_flip_p(differences)
    slow = np.mean(
        [
            abs(np.dot(s, differences)) >= abs(differences.sum()) - 1e-9
            for s in itertools.product((-1, 1), repeat=12)
        ]
    )
    random = sign_flip_p(differences, replicates=20_000, rng=np.random.default_rng(0))
    assert exact == pytest.approx(slow, abs=1e-12)
    assert random == pytest.approx(exact, abs=0.011)


def test_sign_flip_agrees_with_scipys_permutation_test() -> None:
    from scipy.stats import permutation_test

    a, b = np.random.default_rng(5).random((2, 10))
    theirs = permutation_test(
        (a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert exact_sign_flip_p(a - b) == pytest.approx(theirs, abs=1e-12)


def test_no_difference_at_all() -> None:
    rng = np.random.default_rng(0)
    assert sign_flip_p(np.zeros(50), replicates=100, rng=rng) == 1.0
    assert bootstrap_interval(np.zeros((2, 50)), replicates=200, rng=rng) == (0.0, 0.0)


def test_interval_of_one_seed_is_the_ordinary_bootstrap() -> None:
    """Questions alone: the interval's half width is 1.96 standard errors of the mean, to 5 % at 4,000
    replicates.
    """
    differences = np.random.default_rng(1).normal(0.1, 0.5, (1, 400))
    low, high = bootstrap_interval(differences, replicates=4000, rng=np.random.default_rng(2))
    error = differences.std() / 20
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert (high + low) / 2 == pytest.approx(differences.mean(), abs=0.1 * error)


def test_seeds_that_disagree_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    agree = np.tile(rng.normal(0.0, 0.1, (1, 200)), (4, 1))
    disagree = agree + np.array([[-0.3], [-0.1], [0.1], [0.3]])
    widths = []
    for table in (agree, disagree):
        low, high = bootstrap_interval(table, replicates=2000, rng=np.random.default_rng(1))
        widths.append(high - low)
    assert widths[1] > 5 * widths[0]


def table(values: list[list[float]]) -> dict[int, dict[str, float]]:
    return {seed: {f"q{i}": v for i, v in enumerate(row)} for seed, row in enumerate(values)}


def test_paired_difference_counts_flips_and_is_antisymmetric() -> None:
    first, second = table([[1, 1, 0, 1], [1, 0, 0, 1]]), table([[0, 1, 1, 1], [0, 0, 0, 1]])
    forth = paired_difference("a", "b", "x", first, second, replicates=500)
    back = paired_difference("b", "a", "x", second, first, replicates=500)
    assert forth is not None
    assert back is not None
    assert (forth.mean, forth.fixed, forth.broken, forth.seeds, forth.items) == (0.125, 1.0, 0.5, 2, 4)
    assert (back.mean, back.fixed, back.broken) == (-0.125, 0.5, 1.0)
    assert paired_difference("a", "b", "x", first, {7: {"q0": 1.0}}) is None


@pytest.mark.parametrize("seeds", [1, 2, SEEDS_FOR_CLAIM - 1])
def test_too_few_seeds_make_no_claim_however_clear_the_difference(seeds: int) -> None:
    better, worse = table([[1.0] * 200] * seeds), table([[0.0] * 200] * seeds)
    found = paired_difference("a", "b", "x", better, worse, replicates=500)
    assert found is not None
    assert found.p_items < 0.01
    assert found.verdict.startswith("no claim")


def test_enough_seeds_and_a_clear_difference_make_one() -> None:
    better, worse = table([[1.0] * 50] * SEEDS_FOR_CLAIM), table([[0.0] * 50] * SEEDS_FOR_CLAIM)
    assert paired_difference("a", "b", "x", better, worse, replicates=500).verdict == "higher"  # type: ignore[union-attr]
    assert paired_difference("b", "a", "x", worse, better, replicates=500).verdict == "lower"  # type: ignore[union-attr]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_false_claims_are_as_rare_as_promised(seed: int) -> None:
    """Two equal methods: p below .05 must come up in about 5 % of draws; a single draw only has to be a
    valid p.
    """
    rng = np.random.default_rng(seed)
    p = sign_flip_p(rng.normal(size=40), replicates=199, rng=rng)
    assert 1 / 200 <= p <= 1


def test_p_is_uniform_when_nothing_differs() -> None:
    """400 draws: the share below .05 has a standard deviation of .011; .09 is over three of them."""
    rng = np.random.default_rng(11)
    ps = [sign_flip_p(rng.normal(size=30), replicates=199, rng=rng) for _ in range(400)]
    assert np.mean(np.array(ps) <= 0.05) < 0.09


def test_band_averages_over_seeds_step_by_step() -> None:
    found = band([[(1, 0.0), (2, 2.0)], [(1, 2.0), (2, 4.0), (3, 9.0)]])
    assert found is not None
    assert found.steps.tolist() == [1, 2, 3]
    assert found.mean.tolist() == [1.0, 3.0, 9.0]
    assert found.std[:2].tolist() == pytest.approx([2**0.5, 2**0.5])
    assert math.isnan(found.std[2])
    smooth = band([[(1, 0.0), (2, 2.0), (3, 4.0)]], window=2)
    assert smooth is not None
    assert smooth.mean.tolist() == [0.0, 1.0, 3.0]
