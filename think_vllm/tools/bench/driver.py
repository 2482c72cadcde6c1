"""One load of one server: vLLM's load generator, and gauges sampled meanwhile."""

from collections import Counter
from typing import Any

from think_vllm.tools.bench.gauges import (
    PREEMPTIONS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    Occupancy,
    Sampler,
    cache_of,
    counter_of,
    full_cache,
    occupancy_of,
)
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.results import Figures
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common.server import Server

COUNTERS = (PREEMPTIONS, PREFIX_HITS, PREFIX_QUERIES)


def measure_load(
    generator: LoadGenerator,
    server: Server,
    tokenizer: str,
    scenario: Scenario,
    point: LoadPoint,
    seed: int,
) -> Figures:
    """Load a server and look at its gauges meanwhile.

    Args:
        generator: What sends requests.
        server: Already warm.
        tokenizer: Where the load generator finds it.
        scenario: What is sent.
        point: How many.
        seed: Of the prompts and of the gaps between them.

    Raises:
        LoadError: If the load generator fails.
        ServerError: If the server ends.
    """
    before, used = server.get("/metrics"), server.processor_s()
    sampler = Sampler(server)
    sampler.start()
    try:
        result = generator.run(server, generator_arguments(tokenizer, scenario, point, seed))
    finally:
        samples = sampler.stop()
    after, used_then = server.get("/metrics"), server.processor_s()
    processor_s = None if used is None or used_then is None else used_then - used
    counted = [counter_of(after, name) - counter_of(before, name) for name in COUNTERS]
    full = full_cache(scenario.prompt_tokens, cache_of(before))
    return figures_of(result, occupancy_of(samples, full), counted, processor_s, len(samples))


def generator_arguments(
    tokenizer: str, scenario: Scenario, point: LoadPoint, seed: int
) -> list[str]:
    """What vLLM's ``bench serve`` is given."""
    arguments = ["--model", tokenizer, "--num-prompts", str(point.num_prompts)]
    arguments += ["--seed", str(seed), "--temperature", "0", "--ignore-eos"]
    arguments += ["--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "99"]
    arguments += ["--dataset-name", scenario.dataset]
    if scenario.dataset == "random":
        arguments += ["--random-input-len", str(scenario.prompt_tokens)]
        arguments += ["--random-output-len", str(scenario.output_tokens)]
        arguments += ["--random-range-ratio", f"{scenario.length_spread:g}"]
    else:
        suffix = scenario.prompt_tokens - scenario.prefix_tokens
        arguments += ["--prefix-repetition-prefix-len", str(scenario.prefix_tokens)]
        arguments += ["--prefix-repetition-suffix-len", str(suffix)]
        arguments += ["--prefix-repetition-num-prefixes", str(scenario.num_prefixes)]
        arguments += ["--prefix-repetition-output-len", str(scenario.output_tokens)]
    if point.concurrency is not None:
        return [*arguments, "--max-concurrency", str(point.concurrency)]
    rate = ["--request-rate", f"{point.request_rate:g}"]
    return [*arguments, *rate, "--burstiness", f"{scenario.burstiness:g}"]


def figures_of(
    result: dict[str, Any],
    occupancy: Occupancy,
    counted: list[float],
    processor_s: float | None,
    samples: int,
) -> Figures:
    """Put together what the load generator and the gauges say.

    Args:
        result: Of the load generator.
        occupancy: Of the gauges.
        counted: What ``COUNTERS`` grew by.
        processor_s: Processor time of the server; None if unknown.
        samples: How many the gauges gave.
    """
    preemptions, hits, queries = counted
    return Figures(
        completed=result["completed"],
        failed=result["failed"],
        errors=Counter(filter(None, map(_reason_of, result["errors"]))),
        duration_s=result["duration"],
        requests_per_s=result["request_throughput"],
        output_tokens_per_s=result["output_throughput"],
        total_tokens_per_s=result["total_token_throughput"],
        input_tokens=result["total_input_tokens"],
        output_tokens=result["total_output_tokens"],
        median_ttft_ms=result["median_ttft_ms"],
        p99_ttft_ms=result["p99_ttft_ms"],
        median_itl_ms=result["median_itl_ms"],
        p99_itl_ms=result["p99_itl_ms"],
        median_tpot_ms=result["median_tpot_ms"],
        p99_tpot_ms=result["p99_tpot_ms"],
        median_e2el_ms=result["median_e2el_ms"],
        running_mean=occupancy.running_mean,
        running_waiting=occupancy.running_waiting,
        running_peak=occupancy.running_peak,
        cache_use_mean=occupancy.cache_use_mean,
        cache_use_peak=occupancy.cache_use_peak,
        preemptions=round(preemptions),
        prefix_hit_rate=hits / queries if queries else None,
        processor_s=processor_s,
        samples=samples,
    )


def _reason_of(error: str) -> str:
    """The last line of a traceback, or the one line that there is; empty if there is none."""
    return error.strip().rpartition("\n")[2]
