"""Our metrics among vLLM's, in the process that serves ``/metrics``."""

import math
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics

from think_vllm.metrics.catalog import (
    CAPACITY,
    COUNTERS,
    GAUGES,
    PREFIX,
    SECONDS,
    SHARE,
    SHARE_EDGES,
    SHARE_METRIC,
    Report,
)


class ThinkPromMetrics(KVConnectorPromMetrics):
    """Shows reports, with vLLM's labels.

    Args:
        vllm_config: Of the engine.
        metric_types: Counter, Gauge and Histogram, each with the class that stands for it; Ray has
            its own.
        labelnames: Of vLLM's metrics.
        per_engine_labelvalues: Their values, by the number of the engine.
        times_compaction: Whether ranks report seconds.
        has_selections: Whether channels are selected.
    """

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        *,
        times_compaction: bool,
        has_selections: bool,
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._labelvalues = per_engine_labelvalues
        self._counters = {
            name: metric_types[Counter](
                name=PREFIX + name, documentation=metric.help, labelnames=labelnames
            )
            for name, metric in COUNTERS.items()
            if name != SECONDS or times_compaction
        }
        self._gauges = {
            name: metric_types[Gauge](
                name=PREFIX + name,
                documentation=metric.help,
                labelnames=[*labelnames, "kind"] if metric.kinds else labelnames,
                # As vLLM's own: an engine sends its gauges to one API server after another.
                multiprocess_mode="mostrecent",
            )
            for name, metric in GAUGES.items()
        }
        self._share = None
        if has_selections:
            self._share = metric_types[Histogram](
                name=PREFIX + SHARE,
                documentation=SHARE_METRIC.help,
                buckets=list(SHARE_EDGES),
                labelnames=labelnames,
            )
        self._begin()

    def _begin(self) -> None:
        """Show zeros before anything has happened, but for what is not known yet."""
        for values in self._labelvalues.values():
            for counter in self._counters.values():
                counter.labels(*values)
            if self._share is not None:
                self._share.labels(*values)
            for name, metric in GAUGES.items():
                if name != CAPACITY:
                    for kind in metric.kinds or ("",):
                        self._gauge(name, kind, values).set(0)

    def _gauge(self, name: str, kind: str, values: list[object]) -> Any:
        return self._gauges[name].labels(*values, *([kind] if kind else []))

    def observe(self, transfer_stats_data: Report, engine_idx: int = 0) -> None:
        """Show a report of an engine."""
        values = self._labelvalues[engine_idx]
        for name, more in transfer_stats_data.get("counters", {}).items():
            if name in self._counters:
                self._counters[name].labels(*values).inc(more)
        for name, kinds in transfer_stats_data.get("gauges", {}).items():
            for kind, value in kinds.items():
                self._gauge(name, kind, values).set(value)
        if self._share is not None and "shares" in transfer_stats_data:
            share = self._share.labels(*values)
            for value, count in bucket_means(*transfer_stats_data["shares"]):
                # Histograms take one observation at a time.
                for _ in range(count):
                    share.observe(value)


def bucket_means(counts: list[float], sums: list[float]) -> list[tuple[float, int]]:
    """The mean of each bucket that has observations, inside the bucket, and how many there are."""
    means = []
    below = -math.inf
    for edge, count, total in zip(SHARE_EDGES, counts, sums, strict=True):
        if count:
            least = math.nextafter(below, math.inf)
            means.append((min(max(total / count, least), edge), int(count)))
        below = edge
    return means


def forget_metrics() -> None:
    """Unregister what an earlier engine of this process has shown, as vLLM does with its own."""
    for collector in list(REGISTRY._collector_to_names):
        if getattr(collector, "_name", "").startswith(PREFIX):
            REGISTRY.unregister(collector)
