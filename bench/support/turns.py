"""Times of what takes turns in one process, so that each round meets the same machine."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Times:
    """Seconds of each round, by what was measured."""

    rounds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.rounds[name])

    def mean(self, name: str) -> float:
        """Seconds."""
        return statistics.fmean(self.rounds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median of the ratios to ``base``, round by round."""
        pairs = zip(self.rounds[name], self.rounds[base], strict=True)
        return statistics.median(a / b for a, b in pairs)


def timed(
    run: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A function that runs another once, and returns its seconds."""

    def measure() -> float:
        start = clock()
        run()
        return clock() - start

    return measure


def take_turns(runs: dict[str, Callable[[], float]], rounds: int, warm_up: int = 3) -> Times:
    """Run each once a round, in an order that changes.

    Args:
        runs: What is measured; each returns the seconds that it took.
        rounds: That count.
        warm_up: Rounds before these.
    """
    times = Times({name: [] for name in runs})
    names = list(runs)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for index in range(rounds + warm_up):
            names.append(names.pop(0))
            for name in names:
                seconds = runs[name]()
                if index >= warm_up:
                    times.rounds[name].append(seconds)
            # Between rounds and not in one of them; the rest of the process is frozen.
            gc.collect(0)
    finally:
        gc.enable()
        gc.unfreeze()
    return times
