"""Intervals of shares and means, and of their differences on the same questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL_95 = 1.959964  # two-sided 95 % quantile of the normal distribution
RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float  # the figure
    low: float | None  # lower end; None where the data say nothing about it
    high: float | None  # upper end
    method: str  # of the interval


def estimate_text(estimate: Estimate | None, sign: str = "", digits: int = 3) -> str:
    """A figure with its interval, as ``0.950 [0.888, 0.978]``; a dash for none.

    Args:
        estimate: The figure.
        sign: ``+`` for differences, as ``-0.050 [-0.112, +0.004]``.
        digits: Behind the point.
    """
    if estimate is None:
        return "-"
    form = f"{sign}.{digits}f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


@dataclass(frozen=True)
class Difference:
    """Second minus first on the questions that both answered."""

    pairs: int  # number of these
    estimate: Estimate  # mean difference with its interval
    better: int  # questions that the second answered better
    worse: int  # questions that it answered worse
    #: Exact McNemar test of right or wrong answers; sign test of others (the same sum).
    p_value: float


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927): sound at 0 and at 1, unlike the normal one."""
    square = NORMAL_95**2
    share = hits / count
    middle = share + square / (2 * count)
    half = NORMAL_95 * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return (middle - half) / (1 + square / count), (middle + half) / (1 + square / count)


def estimate_mean(scores: Sequence[float], binary: bool, seed: int) -> Estimate | None:
    """Mean of scores; None without any.

    Args:
        scores: 0 to 1.
        binary: Whether they are 0 or 1 by their nature: Wilson's interval, not the bootstrap's.
        seed: Of the bootstrap.
    """
    if not scores:
        return None
    mean = math.fsum(scores) / len(scores)
    if binary:
        return Estimate(mean, *wilson_interval(round(math.fsum(scores)), len(scores)), "Wilson")
    return Estimate(mean, *_bootstrap(scores, seed), "bootstrap")


def estimate_difference(
    first: Sequence[float], second: Sequence[float], binary: bool, seed: int
) -> Difference | None:
    """Difference of means over the same questions; None without any.

    Args:
        first: Scores of the one that is compared with.
        second: Scores of the other, in the same order.
        binary: As for `estimate_mean`.
        seed: Of the bootstrap.
    """
    if not first:
        return None
    differences = [b - a for a, b in zip(first, second, strict=True)]
    better = sum(x > 0 for x in differences)
    worse = sum(x < 0 for x in differences)
    mean = math.fsum(differences) / len(differences)
    if binary:
        both = sum(a == b == 1 for a, b in zip(first, second, strict=True))
        ends = paired_interval(both, worse, better, len(first) - both - worse - better)
        estimate = Estimate(mean, *ends, "Newcombe")
    else:
        estimate = Estimate(mean, *_bootstrap(differences, seed), "paired bootstrap")
    return Difference(len(first), estimate, better, worse, mcnemar_exact(better, worse))


def mcnemar_exact(better: int, worse: int) -> float:
    """Two-sided exact p-value of unequal answers (McNemar 1947, binomial): 1 without any."""
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    # Whole numbers: a float overflows at 1,024 unequal answers.
    return min(1.0, float(2 * tail / 2**count))


def paired_interval(both: int, lost: int, won: int, neither: int) -> tuple[float, float]:
    """95 % interval of a difference of two shares over the same questions.

    Source: Newcombe 1998, Statistics in Medicine 17, 2635, method 10: Wilson's intervals of the
    two shares, joined by their correlation. Sound where no answer differs, unlike a bootstrap.

    Args:
        both: Questions that both answered right.
        lost: Right by the first alone.
        won: Right by the second alone.
        neither: Right by none.

    Returns:
        Of second minus first.
    """
    count = both + lost + won + neither
    first, second = (both + lost) / count, (both + won) / count
    low_1, high_1 = wilson_interval(both + lost, count)
    low_2, high_2 = wilson_interval(both + won, count)
    margins: int = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    phi = 0.0
    if margins:
        product = float(both * neither - lost * won)
        # The correction for small counts works against positive correlation only.
        product = max(product - count / 2, 0.0) if product > 0 else product
        phi = product / math.sqrt(margins)
    difference = second - first
    below = _joined(second - low_2, high_1 - first, phi)
    above = _joined(high_2 - second, first - low_1, phi)
    return difference - below, difference + above


def _joined(one: float, other: float, phi: float) -> float:
    # Rounding may leave a tiny negative number.
    return math.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2))


def _bootstrap(values: Sequence[float], seed: int) -> tuple[float | None, float | None]:
    """Percentile interval of the mean (Efron 1979); none where all values are the same."""
    data = np.asarray(values, dtype=np.float64)
    if np.ptp(data) == 0:
        # Resampling equal values gives an interval of no width, which would be a lie.
        return None, None
    rng = np.random.default_rng(seed)
    # One resample at a time: all of them at once need gigabytes for long lists.
    means = [data[rng.integers(len(data), size=len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
