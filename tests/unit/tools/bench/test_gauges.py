"""vLLM's metrics, from texts written by hand."""

import pytest

from think_vllm.tools.bench.gauges import Cache, Metrics, Sample, full_cache, occupancy_of

TEXT = """\
# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0"} 3.0
vllm:num_requests_running{engine="1"} 4.0
vllm:num_requests_waiting{engine="0"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 9.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:kv_cache_usage_perc{engine="1"} 1.0
vllm:num_preemptions_total{engine="0"} 5.0
vllm:num_preemptions_total{engine="1"} 1.0
vllm:cache_config_info{block_size="48",cache_dtype="auto",engine="0",num_gpu_blocks="100"} 1.0
vllm:cache_config_info{block_size="48",cache_dtype="auto",engine="1",num_gpu_blocks="90"} 1.0
"""


def test_sample_adds_engines_up() -> None:
    assert Metrics(TEXT).sample() == Sample(running=7, waiting=2, cache_use=0.75)
    with pytest.raises(KeyError, match="kv_cache_usage_perc is not among"):
        Metrics("").sample()


def test_counter_is_0_before_its_first_event() -> None:
    assert Metrics(TEXT).counter("vllm:num_preemptions_total") == 6
    assert Metrics(TEXT).counter("vllm:prefix_cache_hits_total") == 0


def test_cache_adds_engines_up() -> None:
    assert Metrics(TEXT).cache() == Cache(num_blocks=190, block_size=48, dtype="auto")
    assert Metrics('vllm:cache_config_info{block_size="16"} 1.0\n').cache() is None
    assert Metrics("").cache() is None


def test_full_cache_leaves_room_for_a_prompt() -> None:
    assert full_cache(100, None) == 0.9
    assert full_cache(48, Cache(1000, 48, "auto")) == 0.9
    # A prompt of 10 of 48 blocks; others are about to need half as much.
    assert full_cache(480, Cache(48, 48, "auto")) == pytest.approx(1 - 1.5 * 11 / 48)
    assert full_cache(4800, Cache(100, 48, "auto")) == 0.5


def test_occupancy_of_counts_those_that_run_while_others_wait() -> None:
    samples = [
        Sample(0, 0, 0.0),
        Sample(4, 10, 0.5),  # prompts still being admitted: not memory
        Sample(8, 6, 0.95),
        Sample(6, 2, 0.85),
        Sample(2, 0, 0.3),
        Sample(0, 0, 0.0),
    ]
    got = occupancy_of(samples, full=0.9)
    running = {"running_waiting": 7, "running_mean": 5, "running_peak": 8}
    assert got == running | {"cache_use_mean": pytest.approx(0.9), "cache_use_peak": 0.95}


def test_occupancy_of_a_cache_that_was_never_full() -> None:
    got = occupancy_of([Sample(4, 10, 0.5), Sample(2, 0, 0.3)], full=0.9)
    assert got["running_waiting"] is None
    assert (got["running_mean"], got["cache_use_mean"]) == (3, 0.4)
    nothing = occupancy_of([], full=0.9)
    assert (nothing["running_peak"], nothing["running_waiting"]) == (0, None)
