"""vLLM's metrics: read once, or sampled while a load runs."""

import statistics
import threading
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from think_vllm.tools.common.server import Server, ServerError

SAMPLE_S = 0.2
#: Share of the blocks in use from which on the cache counts as nearly full, if prompts are small.
FULL_CACHE = 0.9
#: ... and at least, if a prompt needs much of it.
LEAST_FULL_CACHE = 0.5

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USE = "vllm:kv_cache_usage_perc"
CACHE_INFO = "vllm:cache_config_info"
PREEMPTIONS = "vllm:num_preemptions_total"
PREFIX_HITS = "vllm:prefix_cache_hits_total"
PREFIX_QUERIES = "vllm:prefix_cache_queries_total"


@dataclass(frozen=True)
class Cache:
    """KV cache of a server, all engines together."""

    num_blocks: int  # blocks, vLLM's null block included
    block_size: int  # tokens of a dense one
    dtype: str  # vLLM's ``cache_dtype``


@dataclass(frozen=True)
class Sample:
    """One look at the gauges."""

    running: float  # requests
    waiting: float  # requests
    cache_use: float  # share of the blocks in use


class Metrics:
    """Metrics of a server at one time."""

    def __init__(self, text: str) -> None:
        self._samples = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append(sample)

    def values(self, name: str) -> list[float]:
        """Values of a metric, one for each set of labels.

        Raises:
            KeyError: If there is no such metric.
        """
        if name not in self._samples:
            raise KeyError(f"{name} is not among the server's metrics")
        return [sample.value for sample in self._samples[name]]

    def sample(self) -> Sample:
        """The gauges; several engines are added up, and their caches' use is averaged.

        Raises:
            KeyError: If one is missing.
        """
        use = statistics.fmean(self.values(CACHE_USE))
        return Sample(sum(self.values(RUNNING)), sum(self.values(WAITING)), use)

    def counter(self, name: str) -> float:
        """A counter of all engines; 0 before its first event."""
        return sum(sample.value for sample in self._samples[name])

    def cache(self) -> Cache | None:
        """The KV cache; None if the server does not say."""
        labels = [sample.labels for sample in self._samples[CACHE_INFO]]
        try:
            return Cache(
                sum(int(label["num_gpu_blocks"]) for label in labels),
                int(labels[0]["block_size"]),
                labels[0]["cache_dtype"],
            )
        except (IndexError, KeyError, ValueError):
            return None


def read_metrics(server: Server) -> Metrics:
    """Metrics of a server now.

    Raises:
        OSError: If it is out of reach.
        ServerError: If it has ended.
    """
    return Metrics(server.get("/metrics"))


def full_cache(prompt_tokens: int, cache: Cache | None) -> float:
    """Share of the blocks in use from which on a prompt may find no room.

    Args:
        prompt_tokens: Of one request.
        cache: Of the server; None if unknown.
    """
    if cache is None:
        return FULL_CACHE
    # Whole blocks, and what others are about to need.
    share = 1.5 * (prompt_tokens + cache.block_size) / (cache.num_blocks * cache.block_size)
    return max(LEAST_FULL_CACHE, min(FULL_CACHE, 1 - share))


def occupancy_of(samples: Sequence[Sample], full: float) -> dict[str, float | None]:
    """Sum up the samples of a load, as fields of its figures."""
    working = [sample for sample in samples if sample.running > 0]
    first = next((i for i, sample in enumerate(working) if sample.cache_use >= full), len(working))
    crowded = [sample for sample in working[first:] if sample.waiting > 0]
    working = working or [Sample(0.0, 0.0, 0.0)]
    return {
        "running_mean": statistics.fmean(sample.running for sample in working),
        "running_waiting": statistics.fmean(s.running for s in crowded) if crowded else None,
        "running_peak": max(sample.running for sample in working),
        "cache_use_mean": statistics.fmean(sample.cache_use for sample in crowded or working),
        "cache_use_peak": max(sample.cache_use for sample in working),
    }


class Sampler(threading.Thread):
    """Samples a server's gauges until it is stopped."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.samples: list[Sample] = []
        self._server = server
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        is_done = False
        while not is_done:  # once at least, however short the load
            # A busy server may be slow, one that ended is noticed by the load's caller.
            with suppress(OSError, KeyError, ServerError):
                self.samples.append(read_metrics(self._server).sample())
            is_done = self._done.wait(SAMPLE_S)

    def stop(self) -> list[Sample]:
        """End sampling; return the samples."""
        self._done.set()
        self.join()
        return self.samples
