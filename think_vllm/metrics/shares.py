"""Shares of score mass that selections of channels keep, counted where the scores are.

Source: ThinK, arXiv 2407.21018, section 3.2: a channel's score is the norm of its observed
queries times the norm of its keys, here the root of the product of their mean squares. With
grouped queries the mean runs over the heads of the group as well. ``policies.py`` has that product;
where it leaves the queries out, the score is the norm of the keys.
"""

import torch

from think_vllm.metrics.catalog import SHARE_EDGES


def kept_shares(energies: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Score mass of kept channels over that of all.

    Args:
        energies: ``[n, Hk, D]`` float32. Squares of scores, or any multiple of them.
        channels: ``[n, Hk, C]`` uint8. Those that are kept.

    Returns:
        ``[n, Hk]`` float64; 1 where all scores are zero, NaN where a score is no number.
    """
    scores = energies.double().sqrt()
    total = scores.sum(dim=2)
    kept = scores.gather(2, channels.long()).sum(dim=2)
    # Summed in another order, all channels may have a bit more than all channels.
    return torch.where(total == 0, 1.0, kept / total).clamp(max=1.0)


class ShareHistogram:
    """Counts shares in buckets, and hands out what came since it was last asked.

    Nothing waits for a GPU: counts stay on the device, and a copy to the host is handed out by a
    later call, when it is complete.

    Args:
        device: Of the scores.
    """

    def __init__(self, device: torch.device) -> None:
        self._edges = torch.tensor(SHARE_EDGES, dtype=torch.float64, device=device)
        shape = (2, len(SHARE_EDGES))
        # Observations of each bucket and their sum; the former are whole, up to 2 ** 53.
        self._totals = torch.zeros(shape, dtype=torch.float64, device=device)
        self._taken = torch.zeros(shape, dtype=torch.float64)
        self._copy = torch.zeros(shape, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._copied: torch.cuda.Event | None = None
        self._is_new = False

    def add(self, shares: torch.Tensor) -> None:
        """Count shares, but for those that are no numbers.

        Args:
            shares: float64, any shape, at most 1.
        """
        shares = shares.reshape(-1)
        is_number = shares.isfinite()
        shares = torch.where(is_number, shares, 0.0)
        bucket = torch.bucketize(shares, self._edges)
        self._totals[0].scatter_add_(0, bucket, is_number.double())
        self._totals[1].scatter_add_(0, bucket, shares)
        self._is_new = True

    def take(self) -> list[list[float]] | None:
        """Counts and sums of each bucket since the last call; None if there are none."""
        if self._totals.device.type == "cuda":
            return self._take_copied()
        if not self._is_new:
            return None
        self._is_new = False
        self._copy.copy_(self._totals)
        return self._since_taken()

    def _take_copied(self) -> list[list[float]] | None:
        shares = None
        if self._copied is not None:
            if not self._copied.query():  # type: ignore[no-untyped-call]  # torch has no types
                return None
            self._copied = None
            shares = self._since_taken()
        if self._is_new:
            self._is_new = False
            self._copy.copy_(self._totals, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as above
            self._copied.record()
        return shares

    def _since_taken(self) -> list[list[float]] | None:
        counts, sums = (self._copy - self._taken).tolist()
        self._taken.copy_(self._copy)
        return [counts, sums] if any(counts) else None
