"""A line in vLLM's periodic log about what compaction did since the one before."""

import logging
from collections.abc import Callable

from think_vllm.metrics.catalog import BYTES, HITS, SECONDS, SPANS, Report

logger = logging.getLogger("vllm.think_vllm")


class CompactionLog:
    """Adds up reports; stands where vLLM has the log of a KV connector, which there is none of."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all reports."""
        self._sums: dict[str, float] = {}
        self._selections, self._share = 0.0, 0.0

    def observe(self, transfer_stats_data: Report) -> None:
        """Add a report."""
        for name, more in transfer_stats_data.get("counters", {}).items():
            self._sums[name] = self._sums.get(name, 0) + more
        if "shares" in transfer_stats_data:
            counts, sums = transfer_stats_data["shares"]
            self._selections, self._share = self._selections + sum(counts), self._share + sum(sums)

    def log(self, log_fn: Callable[..., None] = logger.info) -> None:
        """Write the line, unless nothing happened."""
        phrases = []
        if spans := self._sums.get(SPANS):
            # A plan that only evicts frees nothing of a prompt that its budget holds.
            freed = self._sums.get(BYTES, 0)
            phrases.append(f"{spans:.0f} spans, {freed / 2**20:.1f} MiB freed")
        if seconds := self._sums.get(SECONDS):
            phrases.append(f"{seconds:.3f} s")
        if self._selections:
            kept = self._share / self._selections
            phrases.append(f"{100 * kept:.1f} % of the score mass kept (mean)")
        if hit := self._sums.get(HITS):
            phrases.append(f"{hit:.0f} tokens hit thin")
        if phrases:
            log_fn("KV compaction: %s", ", ".join(phrases))
        self.reset()
