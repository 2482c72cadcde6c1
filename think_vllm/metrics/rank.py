"""What one rank has measured in its layers, until its model runner sends it."""

import torch

from think_vllm.metrics.catalog import SECONDS, Report
from think_vllm.metrics.shares import ShareHistogram, kept_shares

#: Choices that wait to be counted together, at most: a rank that does not sample is never asked.
MAX_WAITING = 256

_rank: "RankReport | None" = None


class RankReport:
    """Measurements of the layers of one rank.

    Choices of channels are counted together, once a step: a layer's alone are too few numbers for
    what it costs to start the dozen operations on a GPU.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._shares: ShareHistogram | None = None

    def add_seconds(self, seconds: float) -> None:
        """Count time spent on compaction."""
        self._seconds += seconds

    def add_selection(self, energies: torch.Tensor, channels: torch.Tensor) -> None:
        """Count a layer's selections of channels; see ``kept_shares``. Keeps what it is given."""
        self._waiting.append((energies, channels))
        if len(self._waiting) == MAX_WAITING:
            self._count_selections()

    def _count_selections(self) -> None:
        if self._shares is None:
            self._shares = ShareHistogram(self._waiting[0][0].device)
        energies, channels = (torch.cat(layers) for layers in zip(*self._waiting, strict=True))
        self._shares.add(kept_shares(energies, channels))
        self._waiting.clear()

    def take(self) -> Report | None:
        """Hand out what came since the last call; None if nothing did."""
        report: Report = {}
        if self._seconds:
            report["counters"] = {SECONDS: self._seconds}
            self._seconds = 0.0
        if self._waiting:
            self._count_selections()
        shares = None if self._shares is None else self._shares.take()
        if shares is not None:
            report["shares"] = shares
        return report or None


def rank_report() -> RankReport:
    """The report of this process's rank."""
    global _rank
    if _rank is None:
        _rank = RankReport()
    return _rank


def take_report() -> Report | None:
    """What the rank has measured since the last call; see ``RankReport.take``."""
    return None if _rank is None else _rank.take()


def begin_report() -> None:
    """Forget what an earlier engine of this process left."""
    global _rank
    _rank = None
