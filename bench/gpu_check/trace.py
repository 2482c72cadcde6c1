"""Times of tokens of many requests, and what they come to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np


@dataclass
class Trace:
    """One run."""

    start: float  # when all requests were sent, in seconds of any clock
    #: For each request, the time of each step that gave it tokens, and how many.
    tokens: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    #: For each step its time, and how many requests were running.
    running: list[tuple[float, int]] = field(default_factory=list)

    def add(self, request: str, time: float, count: int) -> None:
        """A request got tokens."""
        if count:
            self.tokens.setdefault(request, []).append((time, count))


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; NaN for none."""
    if not values:
        return math.nan
    return float(np.quantile(values, share, method="inverted_cdf"))


def summarize(trace: Trace, end: float) -> dict[str, float]:
    """Throughput, requests at a time, time to first token and time between tokens."""
    elapsed = end - trace.start
    first = [1e3 * (steps[0][0] - trace.start) for steps in trace.tokens.values()]
    # A step that gave several tokens counts for each of them.
    gaps = [
        1e3 * (later - earlier) / count
        for steps in trace.tokens.values()
        for (earlier, _), (later, count) in pairwise(steps)
        for _ in range(count)
    ]
    times = [trace.start, *(time for time, _ in trace.running)]
    counts = [count for _, count in trace.running]
    held = sum(
        count * (later - earlier)
        for count, (earlier, later) in zip(counts, pairwise(times), strict=True)
    )
    total = sum(count for steps in trace.tokens.values() for _, count in steps)
    return {
        "seconds": elapsed,
        "output_tokens": total,
        "output_tokens_per_s": total / elapsed if elapsed > 0 else math.nan,
        "running_mean": held / (times[-1] - trace.start) if len(times) > 1 else 0.0,
        "running_max": max(counts, default=0),
        "ttft_median_ms": quantile(first, 0.5),
        "ttft_p99_ms": quantile(first, 0.99),
        "itl_median_ms": quantile(gaps, 0.5),
        "itl_p99_ms": quantile(gaps, 0.99),
    }
