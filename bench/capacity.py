"""Requests that run at once, and tokens per second, in equal KV memory.

Plain vLLM, its own fp8 cache, and thin blocks, each a server of its own under the same load from
vLLM's load generator, all requests sent at once. "running" is the mean of vLLM's gauge of running
requests while others wait, from the moment the cache was first nearly full: memory is the limit
then, and not how fast prompts are computed. Servers cannot take turns (each needs the whole
machine for its load), so a machine that changes its pace shows in the tokens per second, which are
the load generator's, from the first request to the last; repeat with another order of ``--only``.
Run: ``python -m bench.capacity``.

"plan" is what the plan promises for this load: the mean bytes of a request over the steps of its
decoding (contexts of P + 1 to P + O - 1 tokens for P prompt and O output tokens), plain vLLM's
blocks of 128 tokens against the plan's dense and thin blocks. "of plan" is the measured ratio over
it. What is left out makes the difference: a prompt needs dense blocks until it ends, and blocks
that freed up stay idle until a whole prompt fits.
"""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from bench.machine import describe_machine
from tests.support.server import Server
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.tools.bench.comparison import ratios_of
from think_vllm.tools.bench.driver import generator_arguments, measure_load
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.results import Figures
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common import server as loadtest

REPOSITORY = Path(__file__).resolve().parent.parent
VLLM_BLOCK_SIZE = 128  # its default on CPUs

PLAIN = "plain"
FP8_CACHE = "fp8 cache"
VLLM_CONFIGURATIONS: dict[str, list[str]] = {PLAIN: [], FP8_CACHE: ["--kv-cache-dtype", "fp8"]}
THIN_CONFIGURATIONS = {
    "prune 0.4": ThinkConfig(kv_channel_prune=0.4),
    "prune 0.5": ThinkConfig(kv_channel_prune=0.5),
    "prune 0.5 + fp8": ThinkConfig(kv_channel_prune=0.5, kv_quant="fp8"),
    "kivi4": ThinkConfig(kv_quant="kivi4"),
    "k4v2": ThinkConfig(kv_quant="k4v2"),
    "prune 0.4 + kivi4": ThinkConfig(kv_channel_prune=0.4, kv_quant="kivi4"),
    "prune 0.5 + k4v2": ThinkConfig(kv_channel_prune=0.5, kv_quant="k4v2"),
    "prune 0.5 + kivi2": ThinkConfig(kv_channel_prune=0.5, kv_quant="kivi2"),
}
CONFIGURATIONS = [*VLLM_CONFIGURATIONS, *THIN_CONFIGURATIONS]

HEADER = (
    "| server | running | ratio | plan | of plan | peak | preemptions | output tok/s | of plain "
    "| of fp8 cache | TTFT ms | ITL ms |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def server_arguments(name: str) -> list[str]:
    """Flags of one configuration."""
    if name in VLLM_CONFIGURATIONS:
        return VLLM_CONFIGURATIONS[name]
    config = THIN_CONFIGURATIONS[name]
    flags = (
        ["--kv-channel-prune", f"{config.kv_channel_prune:g}"] if config.kv_channel_prune else []
    )
    return flags + (["--kv-quant", config.kv_quant] if config.kv_quant != "none" else [])


def planned_ratio(name: str, options: argparse.Namespace) -> float | None:
    """Mean bytes of a decoding request, plain over thin; None if vLLM makes no thin blocks.

    Raises:
        ValueError: If the configuration prunes nothing of this model.
    """
    if name in VLLM_CONFIGURATIONS:
        return None
    model = AutoConfig.from_pretrained(options.model)
    # Not every configuration names it.
    head_size = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    plan = plan_blocks(THIN_CONFIGURATIONS[name], head_size, getattr(torch, options.dtype).itemsize)
    if plan is None:
        raise ValueError(f"{name}: prunes nothing of a head of {head_size}")
    return decode_life_ratio(plan, options.input_len, options.output_len)


def decode_life_ratio(plan: BlockPlan, prompt: int, output: int) -> float:
    """Mean bytes of a request over its decode steps, plain vLLM's over the plan's.

    Args:
        plan: How blocks get thin.
        prompt: Tokens of the prompt.
        output: Tokens that are generated; the first one by the prompt's own step, and the last
            one is never stored.
    """
    contexts = range(prompt + 1, prompt + output)
    # Dense tokens that fit the blocks held; a token has as many bytes on either side.
    plain = sum(-(-context // VLLM_BLOCK_SIZE) * VLLM_BLOCK_SIZE for context in contexts)
    thin = sum(plan.blocks_for(context) * plan.block_size for context in contexts)
    return plain / thin


def measure(name: str, options: argparse.Namespace) -> Figures:
    """Start a server, load it, stop it."""
    # As many sequences as there are requests: only memory keeps one waiting.
    arguments = ["--dtype", options.dtype, "--max-num-seqs", str(options.requests)]
    arguments += ["--no-enable-prefix-caching", *server_arguments(name)]
    scenario = Scenario(
        name="capacity",
        description="All requests at once.",
        prompt_tokens=options.input_len,
        output_tokens=options.output_len,
        concurrency=(options.requests,),
        num_prompts=options.requests,
    )
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        memory = options.memory_mb * 10**6
        with (
            Server(options.model, arguments, log, kv_cache_bytes=memory) as server,
            LoadGenerator() as generator,
        ):
            loaded = loadtest.Server(server.url, server.model)
            few = generator_arguments(server.model, scenario, LoadPoint(2, concurrency=2), seed=1)
            generator.run(loaded, few)
            [point] = scenario.points()
            figures = measure_load(generator, loaded, server.model, scenario, point, seed=0)
            if figures.failed:
                raise RuntimeError(f"{figures.failed} requests failed\n{server.log_tail()}")
            if figures.running_waiting is None:
                raise RuntimeError(
                    f"{name}: no request ever waited for memory; use more --requests or less "
                    "--memory-mb"
                )
            return figures


def bind_workers(threads: int) -> None:
    """Give the workers of servers to come this many threads, on as many cores."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise SystemExit(f"--threads {threads}: there are {len(cores)} cores")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[:threads]))


def table_row(name: str, done: dict[str, Figures], planned: float | None) -> str:
    """One row, compared with what has been measured so far."""
    got, plain, fp8_cache = done[name], done.get(PLAIN), done.get(FP8_CACHE)
    ratio = ratios_of(got, plain)["running_waiting"] if plain else None
    tokens = got.output_tokens_per_s
    cells = [
        name,
        f"{got.running_waiting:.1f}",
        cell(ratio),
        cell(planned),
        cell(ratio / planned if ratio and planned else None),
        f"{got.running_peak:.0f}",
        f"{got.preemptions}",
        f"{tokens:.0f}",
        cell(tokens / plain.output_tokens_per_s if plain else None),
        cell(tokens / fp8_cache.output_tokens_per_s if fp8_cache else None),
        f"{got.median_ttft_ms:.0f}",
        f"{got.median_itl_ms:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def cell(value: float | None) -> str:
    """A ratio, or a dash if there is nothing to compare with."""
    return "-" if value is None else f"{value:.2f}"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "tiny-recall")
    parser.add_argument("--dtype", default="bfloat16")
    # With 50 MB the smallest format still leaves more requests waiting than running.
    parser.add_argument("--memory-mb", type=int, default=50)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument(
        "--threads", type=int, help="threads of a worker; vLLM leaves a core free if not given"
    )
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    return parser.parse_args(arguments)


def main() -> None:
    """Print a Markdown table."""
    options = parse_options()
    if options.threads is not None:
        bind_workers(options.threads)
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.capacity', *sys.argv[1:]])}`")
    print(
        f"{options.requests} requests of {options.input_len} + {options.output_len} tokens, "
        f"{options.memory_mb} MB of KV cache, {options.dtype}, {options.model.name}, worker "
        f"threads: {options.threads or 'as vLLM chooses'}\n"
    )
    print(HEADER)
    done: dict[str, Figures] = {}
    # What the others are compared with comes first, in the order given otherwise.
    first = [name for name in VLLM_CONFIGURATIONS if name in options.only]
    for name in [*first, *(name for name in options.only if name not in first)]:
        planned = planned_ratio(name, options)
        done[name] = measure(name, options)
        print(table_row(name, done, planned), flush=True)


if __name__ == "__main__":
    main()
