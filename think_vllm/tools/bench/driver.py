"""One load of one server: vLLM's load generator, and gauges sampled meanwhile."""

from collections import Counter
from typing import Any

from think_vllm.tools.bench.gauges import (
    PREEMPTIONS,
    PREFIX_HITS,
    PREFIX_QUERIES,
    Sampler,
    full_cache,
    occupancy_of,
    read_metrics,
)
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.results import Figures
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common.server import Server

COUNTERS = (PREEMPTIONS, PREFIX_HITS, PREFIX_QUERIES)
#: Figures of vLLM's load generator that have a unit in our names.
_VLLM_NAMES = {
    "duration_s": "duration",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
    "total_tokens_per_s": "total_token_throughput",
    "input_tokens": "total_input_tokens",
    "output_tokens": "total_output_tokens",
}


def measure_load(
    generator: LoadGenerator,
    server: Server,
    tokenizer: str,
    scenario: Scenario,
    point: LoadPoint,
    seed: int,
) -> Figures:
    """Load a server and sample its gauges meanwhile.

    Raises:
        LoadError: If the load generator fails.
        ServerError: If the server ends.
    """
    before, used = read_metrics(server), server.processor_s()
    sampler = Sampler(server)
    sampler.start()
    try:
        result = generator.run(server, generator_arguments(tokenizer, scenario, point, seed))
    finally:
        samples = sampler.stop()
    after, used_then = read_metrics(server), server.processor_s()
    processor_s = None if used is None or used_then is None else used_then - used
    counted = [after.counter(name) - before.counter(name) for name in COUNTERS]
    full = full_cache(scenario.prompt_tokens, before.cache())
    return figures_of(result, occupancy_of(samples, full), counted, processor_s, len(samples))


def generator_arguments(
    tokenizer: str, scenario: Scenario, point: LoadPoint, seed: int
) -> list[str]:
    """Arguments of vLLM's ``bench serve``."""
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
    occupancy: dict[str, float | None],
    counted: list[float],
    processor_s: float | None,
    samples: int,
) -> Figures:
    """Combine the results of the load generator and the gauges.

    Args:
        result: Of the load generator.
        occupancy: Of the gauges.
        counted: Growth of ``COUNTERS``.
        processor_s: Processor time of the server; None if unknown.
        samples: Of the gauges.
    """
    preemptions, hits, queries = counted
    fields = {
        **{name: result[name] for name in Figures.model_fields if name in result},
        **{name: result[vllms_name] for name, vllms_name in _VLLM_NAMES.items()},
        **occupancy,
        # The last line of a traceback is the reason.
        "errors": Counter(
            reason for text in result["errors"] if (reason := text.strip().rpartition("\n")[2])
        ),
        "preemptions": round(preemptions),
        "prefix_hit_rate": hits / queries if queries else None,
        "processor_s": processor_s,
        "samples": samples,
    }
    return Figures.model_validate(fields)
