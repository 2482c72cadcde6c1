"""Figures of rows, with intervals: shares, log-probabilities, and differences of both."""

from dataclasses import dataclass
from functools import cache

from bench.tables.results import Row
from think_vllm.tools.eval.stats import Difference, Estimate, estimate_difference, estimate_mean

#: Of all bootstraps.
SEED = 0
#: A loss of this much is one answer in a hundred.
POINT = 0.01


@dataclass(frozen=True)
class Comparison:
    """One row against another on the same questions; positive is better than the other.

    Args:
        right: Share answered right.
        logprob: Mean log-probability of the right digits; nats a digit.
    """

    right: Difference
    logprob: Difference


def share_right(row: Row, way: str, size: int | None = None) -> Estimate:
    """Share answered right, with Wilson's interval."""
    estimate = estimate_mean(row.right(way, size), binary=True, seed=SEED)
    if estimate is None:
        raise ValueError(f"share_right: nothing was asked {way} at {size}")
    return estimate


def compare(row: Row, other: Row, way: str, size: int | None = None) -> Comparison:
    """Compare a row with another that answered the same questions."""
    return _compare(
        tuple(other.right(way, size)),
        tuple(row.right(way, size)),
        tuple(other.logprob(way, size)),
        tuple(row.logprob(way, size)),
    )


@cache  # tables and plots ask for the same; a bootstrap takes a moment
def _compare(
    right_1: tuple[float, ...],
    right_2: tuple[float, ...],
    logprob_1: tuple[float, ...],
    logprob_2: tuple[float, ...],
) -> Comparison:
    right = estimate_difference(right_1, right_2, binary=True, seed=SEED)
    logprob = estimate_difference(logprob_1, logprob_2, binary=False, seed=SEED)
    if right is None or logprob is None:
        raise ValueError("compare: the rows have no questions in common")
    return Comparison(right, logprob)


def sign(estimate: Estimate) -> int:
    """1 or -1 where a difference's whole interval is on one side of zero, 0 where it is not."""
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > 0) - int(estimate.high < 0)


def within_a_point(comparison: Comparison) -> bool | None:
    """Whether a loss of more than a point is ruled out; None where neither is shown."""
    estimate = comparison.right.estimate
    if estimate.low is None or estimate.high is None:
        return None
    if estimate.low >= -POINT:
        return True
    return False if estimate.high < -POINT else None
