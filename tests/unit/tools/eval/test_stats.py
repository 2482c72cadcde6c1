import math

import pytest

from think_vllm.tools.eval import stats
from think_vllm.tools.eval.stats import estimate_difference, estimate_mean, mcnemar_exact


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_is_the_published_one(hits, count, low, high):
    assert stats.wilson_interval(hits, count) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(
    ("cells", "low", "high", "digits"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 2635, table II.
        ((36, 12, 2, 0), 0.0569, 0.3404, 4),
        # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33, 2850.
        ((1, 1, 7, 12), -0.507, -0.026, 3),
    ],
)
def test_paired_interval_is_the_published_one(cells, low, high, digits):
    # There it is first minus second.
    second_minus_first = stats.paired_interval(*cells)
    assert [round(-x, digits) for x in reversed(second_minus_first)] == [low, high]


def test_paired_interval_of_equal_answers_has_width():
    low, high = stats.paired_interval(both=20, lost=0, won=0, neither=0)
    assert low < -0.05
    assert high > 0.05


@pytest.mark.parametrize(
    ("better", "worse", "p_value"),
    [(0, 0, 1.0), (1, 1, 1.0), (2, 12, 2 * 106 / 2**14), (12, 2, 212 / 2**14), (6, 0, 2 / 64)],
)
def test_mcnemar_exact_is_the_binomial_tail(better, worse, p_value):
    assert mcnemar_exact(better, worse) == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_exact_holds_many_answers():
    assert mcnemar_exact(2000, 2000) == 1.0
    assert 0 < mcnemar_exact(900, 1100) < 1e-4


def test_estimate_mean_of_binary_scores_is_wilsons():
    estimate = estimate_mean([1.0] * 19 + [0.0], binary=True, seed=0)
    assert estimate is not None
    assert estimate.value == 0.95
    assert (estimate.low, estimate.high) == stats.wilson_interval(19, 20)


def test_estimate_mean_of_graded_scores_is_near_the_normal_interval():
    scores = [i / 99 for i in range(100)] * 4
    estimate = estimate_mean(scores, binary=False, seed=1)
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    half = 1.96 * math.sqrt(1 / 12 / 400)
    # A bootstrap of 10,000 resamples is some percent of its width off.
    assert estimate.low == pytest.approx(0.5 - half, abs=0.1 * half)
    assert estimate.high == pytest.approx(0.5 + half, abs=0.1 * half)
    assert estimate == estimate_mean(scores, binary=False, seed=1)


def test_estimate_mean_of_equal_graded_scores_has_no_interval():
    estimate = estimate_mean([0.5] * 10, binary=False, seed=0)
    assert estimate is not None
    assert (estimate.value, estimate.low, estimate.high) == (0.5, None, None)
    assert estimate_mean([], binary=True, seed=0) is None


def test_estimate_difference_pairs_the_answers():
    first, second = [1.0, 1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0, 0.0]
    difference = estimate_difference(first, second, binary=True, seed=0)
    assert difference is not None
    assert (difference.better, difference.worse, difference.pairs) == (1, 2, 5)
    assert difference.estimate.value == pytest.approx(-0.2)
    ends = stats.paired_interval(both=1, lost=2, won=1, neither=1)
    assert (difference.estimate.low, difference.estimate.high) == ends
    assert difference.p_value == mcnemar_exact(1, 2)


def test_estimate_difference_of_graded_scores_is_narrower_than_unpaired():
    first = [i / 10 for i in range(11)] * 5
    second = [x - 0.1 if i % 2 else x for i, x in enumerate(first)]
    difference = estimate_difference(first, second, binary=False, seed=3)
    assert difference is not None
    assert difference.estimate.low is not None
    assert difference.estimate.high is not None
    # Unpaired, either mean alone is known to +-0.08 only.
    assert difference.estimate.high < 0
    assert difference.estimate.high - difference.estimate.low < 0.04
