"""Reading the metrics of a pruned cache, as Prometheus would."""

import time

from prometheus_client.parser import text_string_to_metric_families

from tests.support.served import METRIC_TIMEOUT_S, POLL_S, Served
from think_vllm.metrics.catalog import HELD, PREFIX, SHARE, SHARE_EDGES, SPANS


class Snapshot:
    """What ``/metrics`` said at one time, without our prefix."""

    def __init__(self, text: str) -> None:
        self._samples = [
            (sample.name.removeprefix(PREFIX), sample.labels, sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name.startswith(PREFIX)
        ]

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """Sum over all engines.

        Raises:
            KeyError: If there is no such sample.
        """
        found = [
            value
            for sample, have, value in self._samples
            if sample == name and labels.items() <= have.items()
        ]
        if not found:
            raise KeyError(f"no {name} with {labels} among {sorted(self.names)}")
        return sum(found)

    def total(self, counter: str) -> float:
        return self.value(f"{counter}_total")

    def share_buckets(self) -> list[float]:
        """Shares up to each edge."""
        # Prometheus writes edges as floats: 1.0, 0.85.
        return [self.value(f"{SHARE}_bucket", le=str(float(edge))) for edge in SHARE_EDGES]


def read_metrics(server: Served) -> Snapshot:
    """Look now."""
    return Snapshot(server.metrics_text())


def steady_metrics(server: Served, spans: float | None = None) -> Snapshot:
    """Look when nothing runs any more, and ``spans`` spans have become thin altogether, if given.

    Raises:
        AssertionError: If that does not come about.
    """
    deadline = time.monotonic() + METRIC_TIMEOUT_S
    server.wait_for_metric("vllm:num_requests_running", 0)
    while True:
        seen = read_metrics(server)
        held = [seen.value(HELD, kind=kind) for kind in ("dense", "thin")]
        found = seen.total(SPANS)
        if not any(held) and found == (found if spans is None else spans):
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"{found} spans of {spans}, {held} tokens held")
        time.sleep(POLL_S)
