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
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from bench.machine import describe_machine
from tests.support.server import Server
from think_vllm.config import ThinkConfig
from think_vllm.planner import BlockPlan, plan_blocks

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.1
#: Share from which on the cache counts as nearly full; a default prompt takes another 4 %.
FULL_CACHE = 0.9
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


@dataclass(frozen=True)
class Measurement:
    """One server under load."""

    running: float
    peak: float
    preemptions: float
    tokens_per_second: float
    median_ttft_ms: float
    median_itl_ms: float


class RunningSampler(threading.Thread):
    """Samples how many requests run while at least one waits for memory."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self._server = server
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        was_full = False
        while not self._done.wait(SAMPLE_SECONDS):
            usage = self._server.metric("vllm:kv_cache_usage_perc")
            was_full = was_full or usage >= FULL_CACHE
            if was_full and self._server.metric("vllm:num_requests_waiting") > 0:
                self.samples.append(self._server.metric("vllm:num_requests_running"))

    def stop(self) -> list[float]:
        """End sampling; return the samples."""
        self._done.set()
        self.join()
        return self.samples


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


def measure(name: str, options: argparse.Namespace) -> Measurement:
    """Start a server, load it, stop it."""
    # As many sequences as there are requests: only memory keeps one waiting.
    arguments = ["--dtype", options.dtype, "--max-num-seqs", str(options.requests)]
    arguments += ["--no-enable-prefix-caching", *server_arguments(name)]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            options.model,
            arguments,
            Path(folder) / "server.log",
            kv_cache_bytes=options.memory_mb * 10**6,
        )
        with server:
            load(server, options, Path(folder) / "warm-up.json", requests=2)
            sampler = RunningSampler(server)
            sampler.start()
            result = load(server, options, Path(folder) / "load.json", options.requests)
            samples = sampler.stop()
            if result["completed"] != options.requests:
                raise RuntimeError(f"{result['failed']} requests failed\n{server.log_tail()}")
            if not samples:
                raise RuntimeError(
                    f"{name}: no request ever waited for memory; use more --requests or less "
                    "--memory-mb"
                )
            return Measurement(
                running=statistics.fmean(samples),
                peak=max(samples),
                preemptions=server.metric("vllm:num_preemptions_total"),
                tokens_per_second=result["output_throughput"],
                median_ttft_ms=result["median_ttft_ms"],
                median_itl_ms=result["median_itl_ms"],
            )


def load(server: Server, options: argparse.Namespace, out: Path, requests: int) -> dict[str, float]:
    """Run vLLM's load generator in a process of its own."""
    command = [sys.executable, "-m", "bench.load_generator"]
    command += ["--backend", "vllm", "--base-url", server.url, "--model", server.model]
    command += ["--dataset-name", "random", "--random-input-len", str(options.input_len)]
    command += ["--random-output-len", str(options.output_len), "--ignore-eos"]
    command += ["--num-prompts", str(requests), "--seed", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(out.parent), "--result-filename", out.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    if done.returncode != 0:
        raise RuntimeError(f"load generator failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    result: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return result


def bind_workers(threads: int) -> None:
    """Give the workers of servers to come this many threads, on as many cores."""
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise SystemExit(f"--threads {threads}: there are {len(cores)} cores")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[:threads]))


def table_row(name: str, done: dict[str, Measurement], planned: float | None) -> str:
    """One row, compared with what has been measured so far."""
    got, plain, fp8_cache = done[name], done.get(PLAIN), done.get(FP8_CACHE)
    ratio = got.running / plain.running if plain else None
    tokens = got.tokens_per_second
    cells = [
        name,
        f"{got.running:.1f}",
        cell(ratio),
        cell(planned),
        cell(ratio / planned if ratio and planned else None),
        f"{got.peak:.0f}",
        f"{got.preemptions:.0f}",
        f"{tokens:.0f}",
        cell(tokens / plain.tokens_per_second if plain else None),
        cell(tokens / fp8_cache.tokens_per_second if fp8_cache else None),
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
    done: dict[str, Measurement] = {}
    # What the others are compared with comes first, in the order given otherwise.
    first = [name for name in VLLM_CONFIGURATIONS if name in options.only]
    for name in [*first, *(name for name in options.only if name not in first)]:
        planned = planned_ratio(name, options)
        done[name] = measure(name, options)
        print(table_row(name, done, planned), flush=True)


if __name__ == "__main__":
    main()
