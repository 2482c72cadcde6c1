"""What is shown of reports: on ``/metrics``, and in the log."""

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.conftest import REPOSITORY
from tests.support.metrics import Snapshot
from think_vllm.metrics.catalog import COUNTERS, GAUGES, PREFIX, SHARE, SHARE_EDGES
from think_vllm.metrics.log import CompactionLog
from think_vllm.metrics.prometheus import ThinkPromMetrics, bucket_means, forget_metrics

LABELS = ["model_name", "engine"]
ENGINES: dict[int, list[object]] = {0: ["m", "0"], 1: ["m", "1"]}
SHARES = [[0.0] * len(SHARE_EDGES), [0.0] * len(SHARE_EDGES)]
SHARES[0][4], SHARES[1][4] = 3.0, 1.7  # between 0.5 and 0.6
REPORT: dict[str, Any] = {
    "counters": {"spans_compacted": 2, "compaction_seconds": 0.5},
    "gauges": {"held_tokens": {"dense": 7, "thin": 24}, "capacity_multiple": {"": 1.25}},
    "shares": SHARES,
}


def make(registry: Any, times_compaction: bool = True, has_selections: bool = True) -> Any:
    types = {kind: partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    return ThinkPromMetrics(
        SimpleNamespace(kv_transfer_config=None),
        types,  # type: ignore[arg-type]
        LABELS,
        ENGINES,
        times_compaction=times_compaction,
        has_selections=has_selections,
    )


def shown(registry: CollectorRegistry) -> Snapshot:
    return Snapshot(generate_latest(registry).decode())


def test_reports_are_shown_by_engine() -> None:
    registry = CollectorRegistry()
    metrics = make(registry)
    # As it comes from the engine's process.
    sent = MsgpackDecoder().decode(MsgpackEncoder().encode(REPORT))
    metrics.observe(sent, 1)
    metrics.observe(sent, 1)
    seen = shown(registry)
    assert seen.value("spans_compacted_total", engine="1", model_name="m") == 4
    assert seen.value("compaction_seconds_total", engine="1") == 1
    assert seen.value("held_tokens", engine="1", kind="thin") == 24
    assert seen.value("capacity_multiple", engine="1") == 1.25
    assert seen.value(f"{SHARE}_count", engine="1") == 6
    assert seen.value(f"{SHARE}_sum", engine="1") == pytest.approx(3.4, abs=1e-12)
    assert seen.share_buckets() == [0.0] * 4 + [6.0] * 13
    # Zeros, but for a capacity that is not known yet.
    assert seen.value("spans_compacted_total", engine="0") == 0
    assert seen.value("held_tokens", engine="0") == 0
    with pytest.raises(KeyError):
        seen.value("capacity_tokens")


def test_what_is_not_measured_is_not_shown() -> None:
    registry = CollectorRegistry()
    metrics = make(registry, times_compaction=False, has_selections=False)
    metrics.observe(REPORT, 0)
    names = shown(registry).names
    assert "spans_compacted_total" in names
    assert not [name for name in names if name.startswith((SHARE, "compaction_seconds"))]


def test_metrics_of_a_process_can_be_shown_again() -> None:
    make(REGISTRY)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        make(REGISTRY)
    forget_metrics()
    make(REGISTRY)
    forget_metrics()
    assert PREFIX not in generate_latest(REGISTRY).decode()


def test_bucket_means_stay_in_their_buckets() -> None:
    counts = [3.0] * len(SHARE_EDGES)
    # As rounding might have them: on the edges of the bucket.
    for ends in (SHARE_EDGES, (0.0, *SHARE_EDGES[:-1])):
        means = bucket_means(counts, [3 * end for end in ends])
        below = (-1.0, *SHARE_EDGES[:-1])
        for (mean, count), low, high in zip(means, below, SHARE_EDGES, strict=True):
            assert low < mean <= high
            assert count == 3


def test_log_says_what_happened_since_the_last_line() -> None:
    log, lines = CompactionLog(), []

    def log_fn(text: str, *values: object) -> None:
        lines.append(text % values)

    log.log(log_fn)
    log.observe({**REPORT, "counters": {"spans_compacted": 2, "freed_bytes": 3 * 2**20}})
    log.observe({"counters": {"compaction_seconds": 0.5, "thin_prefix_hit_tokens": 64}})
    log.log(log_fn)
    log.log(log_fn)
    assert lines == [
        "KV compaction: 2 spans, 3.0 MiB freed, 0.500 s, 56.7 % of the score mass kept (mean), "
        "64 tokens hit thin"
    ]


def test_log_of_spans_that_freed_nothing() -> None:
    log, lines = CompactionLog(), []
    log.observe({"counters": {"spans_compacted": 2}})
    log.log(lambda text, *values: lines.append(text % values))
    assert lines == ["KV compaction: 2 spans, 0.0 MiB freed"]


def test_every_metric_is_documented() -> None:
    text = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `think_vllm:(\w+)", text, re.MULTILINE))
    assert documented == {*(f"{name}_total" for name in COUNTERS), *GAUGES, SHARE}
