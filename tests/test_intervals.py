"""The interval of a difference of two rows: what it equals, what leaves it alone, and how often it holds the truth."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fastkd.comparison import t_distribution
from fastkd.comparison.intervals import Difference, Scores, holm, paired
from fastkd.comparison.items import by_text

# ---- Student's t ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df", [1, 1.3, 2, 4.7, 30, 31, 420, 1e5])
def test_the_t_distribution_is_scipys(df: float) -> None:
    for t in (-50.0, -3.2, -0.4, 0.0, 0.01, 1.96, 7.0, 12.7, 300.0):
        assert t_distribution.cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=2e-6)
    for p in (0.5, 0.8, 0.975, 0.995):
        assert t_distribution.quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-4, abs=1e-9)


# ---- what it equals ------------------------------------------------------------------------------------------


def same_as_scipy(found: Difference, own: Scores, other: Scores) -> None:
    test = stats.ttest_rel(own, other)
    low, high = test.confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(low) and found.mean + found.half_width == pytest.approx(high)
    assert found.p_value == pytest.approx(test.pvalue, rel=1e-4)


def test_scores_without_items_have_the_paired_t_interval_over_seeds() -> None:
    own, other = np.array([80.1, 81.4, 79.9]), np.array([78.0, 79.1, 79.2])
    found = paired(own, other)
    assert (found.seeds, found.items) == (3, 0) and found.p_better > 0.9
    same_as_scipy(found, own, other)
    assert paired(own, other, lower_is_better=True).p_better == pytest.approx(1 - found.p_better)


def test_one_seed_has_the_paired_t_interval_over_items_and_says_so() -> None:
    right = np.random.default_rng(0).integers(0, 2, (2, 1, 300)).astype(float)
    found = paired(*right)
    assert found.is_of_one_seed and (found.seeds, found.items) == (1, 300)
    same_as_scipy(found, right[0, 0], right[1, 0])


@pytest.mark.parametrize("own", [[81.0], [81.0, 82.0], [[1.0, 1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]], ids=str)
def test_where_nothing_varies_there_is_no_interval(own: list) -> None:
    found = paired(np.array(own), np.array(own) - 1)
    assert (found.mean, found.half_width, found.p_better, found.p_value) == (1.0, None, None, 1.0)
    assert not found.is_of_one_seed


def test_seeds_that_differ_widen_what_items_say() -> None:
    chance = np.random.default_rng(1)
    of_items = chance.normal(size=(3, 500))
    apart = np.array([[-1.0], [0.0], [1.0]])
    zero = np.zeros_like(of_items)
    assert paired(of_items + apart, zero).half_width > 5 * paired(of_items, zero).half_width


def test_holm_stops_at_the_first_that_fails() -> None:
    assert holm([0.04, 0.001, 0.02, 0.012]) == [True, True, True, True]
    assert holm([0.04, 0.001, 0.03, 0.012]) == [False, True, False, True]
    assert holm([0.02, 0.03, 0.9]) == [False, False, False] and holm([]) == []


# ---- what leaves it alone ------------------------------------------------------------------------------------

shapes = st.one_of(st.tuples(st.integers(1, 5)), st.tuples(st.integers(1, 5), st.integers(1, 30)))
both = shapes.flatmap(lambda shape: hnp.arrays(np.float64, (2, *shape), elements=st.integers(-3, 3)))


def alike(found: Difference, half_width: float | None, p_better: float | None) -> None:
    if half_width is None or p_better is None:
        assert found.half_width is None and found.p_better is None
    else:
        assert found.half_width == pytest.approx(half_width, rel=1e-9)
        assert found.p_better == pytest.approx(p_better, rel=1e-6, abs=1e-9)


@given(both)
def test_swapping_the_rows_negates_it(scores: np.ndarray) -> None:
    found, swapped = paired(*scores), paired(*scores[::-1])
    assert swapped.mean == pytest.approx(-found.mean)
    alike(swapped, found.half_width, None if found.p_better is None else 1 - found.p_better)
    alike(paired(*scores, lower_is_better=True), swapped.half_width, swapped.p_better)


@given(both, st.integers(-50, 50))
def test_a_constant_shifts_it(scores: np.ndarray, constant: int) -> None:
    found, shifted = paired(*scores), paired(scores[0] + constant, scores[1])
    assert shifted.mean == pytest.approx(found.mean + constant)
    alike(shifted, found.half_width, shifted.p_better)


@given(both, st.randoms(use_true_random=False))
def test_the_order_of_items_and_of_seeds_does_not_matter(scores: np.ndarray, random) -> None:
    found = paired(*scores)
    for axis in range(1, scores.ndim):
        order = list(range(scores.shape[axis]))
        random.shuffle(order)
        scores = scores.take(order, axis=axis)
    alike(paired(*scores), found.half_width, found.p_better)


# ---- how often it holds the truth ----------------------------------------------------------------------------


def normal(seeds: int, items: int, share: float, rest: float, chance: np.random.Generator) -> Iterator[tuple]:
    """Pairs of rows whose true difference is 1: scores of items + seeds + what is left, all normal.

    Args:
        share: of the variance of the mean difference, what seeds make.
        rest: of what items make, the share that differs from seed to seed.
    """
    of_seeds, of_items, left = (
        (share * seeds) ** 0.5,
        ((1 - share) * (1 - rest) * items) ** 0.5,
        ((1 - share) * rest * items * seeds) ** 0.5,
    )
    while True:
        other = chance.normal(0, 5, (seeds, 1)) + chance.normal(0, 5, items)  # what both rows share
        moved = of_seeds * chance.normal(size=(seeds, 1)) + of_items * chance.normal(size=items)
        yield other + 1 + moved + left * chance.normal(size=(seeds, items)), other, 1.0


def right_or_wrong(seeds: int, items: int, between: float, chance: np.random.Generator) -> Iterator[tuple]:
    """Pairs of rows of 0 and 1: P(right) is logistic in a row's ability, which moves by `between` from seed to seed, an item's
    ease, and how this row finds this item."""
    abilities, ease, own_view = np.array([1.2, 1.0]), 1.5, 0.7
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = (ease**2 + own_view**2 + between**2) ** 0.5
    expected = [float(weights @ (1 / (1 + np.exp(-(mean + spread * nodes)))) / weights.sum()) for mean in abilities]
    while True:
        logits = (
            abilities[:, None, None]
            + between * chance.normal(size=(2, seeds, 1))
            + ease * chance.normal(size=items)
            + own_view * chance.normal(size=(2, 1, items))
        )
        right = (chance.random((2, seeds, items)) < 1 / (1 + np.exp(-logits))).astype(float)
        yield right[0], right[1], expected[0] - expected[1]


def of_texts(seeds: int, between: float, chance: np.random.Generator) -> Iterator[tuple]:
    """Pairs of rows some 20 points apart, right or wrong in 400 texts of 1 to 39 items: P(right) is logistic in a row's
    ability, which moves by `between` from seed to seed, and a text's ease."""
    abilities, ease = np.array([1.5, 0.4]), 0.8
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    spread = (ease**2 + between**2) ** 0.5
    expected = [float(weights @ (1 / (1 + np.exp(-(mean + spread * nodes)))) / weights.sum()) for mean in abilities]
    while True:
        sizes = chance.integers(1, 40, 400)
        logits = abilities[:, None, None] + between * chance.normal(size=(2, seeds, 1)) + ease * chance.normal(size=400)
        likely = np.repeat(1 / (1 + np.exp(-logits)), sizes, axis=-1)
        right = chance.random(likely.shape) < likely
        own, other = (np.stack([by_text(each, sizes.tolist()) for each in row]) for row in right)
        yield own, other, expected[0] - expected[1]


def coverage(pairs: Iterator[tuple], trials: int) -> float:
    found = [(paired(own, other), truth) for own, other, truth in islice(pairs, trials)]
    return float(np.mean([abs(difference.mean - truth) <= difference.half_width for difference, truth in found]))


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds: int) -> None:
    """The short form of the next two tests: 95% of the time, within what 300 trials can tell."""
    share = 0.0 if seeds == 1 else 0.5
    assert 0.91 <= coverage(normal(seeds, 200, share, 0.3, np.random.default_rng(seeds)), 300) <= 0.985


def test_a_bootstrap_of_two_seeds_does_not() -> None:
    """Why nothing is resampled: Owen's pigeonhole bootstrap, which draws seeds and items with replacement."""
    chance, seeds, items, draws = np.random.default_rng(0), 2, 200, 300
    of_seeds = chance.multinomial(seeds, np.full(seeds, 1 / seeds), draws) / seeds
    of_items = chance.multinomial(items, np.full(items, 1 / items), draws) / items
    held = []
    for own, other, truth in islice(normal(seeds, items, 0.8, 0.3, chance), 300):
        low, high = np.quantile(((of_items @ (own - other).T) * of_seeds).sum(axis=1), [0.025, 0.975])
        held.append(low <= truth <= high)
    assert np.mean(held) < 0.85


@pytest.mark.exhaustive
@pytest.mark.parametrize("items", [200, 2000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_it_holds_the_truth_in_93_to_97_of_100_trials(seeds: int, share: float, items: int) -> None:
    pairs = normal(seeds, items, share, 0.3, np.random.default_rng([seeds, items, int(100 * share)]))
    assert 0.93 <= coverage(pairs, 1000) <= 0.97


@pytest.mark.exhaustive
@pytest.mark.parametrize("items", [200, 2000])
@pytest.mark.parametrize("between", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_it_does_so_for_right_and_wrong(seeds: int, between: float, items: int) -> None:
    pairs = right_or_wrong(seeds, items, between, np.random.default_rng([seeds, items, int(100 * between)]))
    assert 0.93 <= coverage(pairs, 1000) <= 0.97


@pytest.mark.exhaustive
@pytest.mark.parametrize("between", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_it_does_so_for_texts_of_many_lengths(seeds: int, between: float) -> None:
    pairs = of_texts(seeds, 0.0 if seeds == 1 else between, np.random.default_rng([seeds, int(100 * between)]))
    assert 0.93 <= coverage(pairs, 1000) <= 0.97
