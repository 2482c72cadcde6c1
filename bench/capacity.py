"""Requests that run at once in equal KV memory: plain vLLM, its fp8 cache, and pruned blocks.

Starts each server in turn, drives it with vLLM's own load generator, and samples vLLM's own
gauge of running requests while others wait. Run: ``python -m bench.capacity``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import describe_machine
from tests.support.server import Server

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.1

CONFIGURATIONS: dict[str, list[str]] = {
    "plain": [],
    "fp8": ["--kv-cache-dtype", "fp8"],
    "prune 0.4": ["--kv-channel-prune", "0.4"],
    "prune 0.5": ["--kv-channel-prune", "0.5"],
}


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
    """Samples how many requests run while at least one waits."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.samples: list[float] = []
        self._server = server
        self._done = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        while not self._done.wait(SAMPLE_SECONDS):
            if self._server.metric("vllm:num_requests_waiting") > 0:
                self.samples.append(self._server.metric("vllm:num_requests_running"))

    def stop(self) -> list[float]:
        """End sampling; return the samples."""
        self._done.set()
        self.join()
        return self.samples


def measure(arguments: Sequence[str], options: argparse.Namespace) -> Measurement:
    """Start a server, load it, stop it."""
    common = ["--dtype", options.dtype, "--max-num-seqs", str(options.requests)]
    common += ["--no-enable-prefix-caching"]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            options.model,
            [*common, *arguments],
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


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=REPOSITORY / "models" / "tiny-recall")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory-mb", type=int, default=100)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    options = parser.parse_args()
    print(describe_machine())
    print(
        f"{options.requests} requests of {options.input_len} + {options.output_len} tokens, "
        f"{options.memory_mb} MB of KV cache, {options.dtype}, {options.model.name}\n"
    )
    print("| server | running | ratio | peak | preemptions | output tok/s | TTFT ms | ITL ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    plain: Measurement | None = None
    for name in options.only:
        got = measure(CONFIGURATIONS[name], options)
        plain = plain or got
        print(
            f"| {name} | {got.running:.1f} | {got.running / plain.running:.2f} | {got.peak:.0f} "
            f"| {got.preemptions:.0f} | {got.tokens_per_second:.0f} | {got.median_ttft_ms:.0f} "
            f"| {got.median_itl_ms:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
