"""Decode attention on an NVIDIA GPU: every format, beside other kernels and the memory.

For each batch and context: our kernels over thin blocks, those of ``bench/gpu_rivals.py`` that
load, and the time in which the machine copies as many bytes as each of them reads (measured, half
of a device-to-device copy's read and write). Kernels take turns, so that each round meets the same
clocks; medians of rounds, timed with events after the L2 cache has been overwritten. What fails is
left out and named.

Prints tables, and writes JSON with date, GPU and versions after every batch and context. Run:
``python -m bench.gpu_attention --out FILE.json``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.machine import gpu_machine
from bench.gpu_rivals import RIVALS, Kernel, Maker, flash_version, take
from bench.support.plans import plan_of
from bench.support.turns import take_turns
from csrc_triton.decode import decode_attention, decode_splits
from csrc_triton.splits import make_workspace
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan
from think_vllm.tools.common.compact import write_json
from think_vllm.tools.common.markdown import table

L2_BYTES = 256 * 2**20  # larger than any L2 cache
COPY_BYTES = 2 * 2**30
#: For how long the GPU idles before a kernel, so that the host has enqueued all of it by then.
IDLE_CYCLES = 1_000_000


def timed_on_gpu(run: Callable[[], Any], flush: torch.Tensor) -> Callable[[], float]:
    """A function that runs a kernel once, behind memory that fills the L2 cache: its seconds."""

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(IDLE_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return measure


def time_in_turns(kernels: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each kernel in microseconds."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times = take_turns({name: timed_on_gpu(run, flush) for name, run in kernels.items()}, rounds)
    return {name: 1e6 * times.median(name) for name in kernels}


def measure_bandwidth() -> float:
    """Bytes per second that the GPU reads and writes while it copies."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    took = time_in_turns({"copy": lambda: target.copy_(source)}, 11)["copy"]
    return 2 * COPY_BYTES / (took * 1e-6)


def random_memory(num_bytes: int) -> torch.Tensor:
    """Memory for caches: bytes that are finite numbers in every format."""
    return torch.randint(0, 64, (num_bytes,), dtype=torch.uint8, device="cuda")


def memory_needed(batch: int, context: int, num_kv_heads: int, head_size: int) -> int:
    """Bytes of the largest cache: of bf16, with a span more for each request."""
    return batch * (context + 2048) * num_kv_heads * 2 * head_size * 2


def think_kernel(plan: BlockPlan) -> Maker:
    """Our decode attention over blocks of a plan."""

    def make(query: torch.Tensor, num_kv_heads: int, context: int, memory: torch.Tensor) -> Kernel:
        num_seqs, num_heads, head_size = query.shape
        width = -(-context // plan.block_size)
        spans = plan.rule.prompt_spans(context)
        freed = plan.span_blocks - plan.thin_blocks
        num_blocks = num_seqs * (width - spans * freed) + 1
        shape = (num_blocks, num_kv_heads, plan.block_size, 2 * head_size)
        cache = take(memory, shape, query.dtype)
        # Row entries behind a span's thin blocks are null, as vLLM's manager leaves them.
        position = torch.arange(width)
        held = position >= spans * plan.span_blocks
        held |= position % plan.span_blocks < plan.thin_blocks
        table = torch.zeros(num_seqs, width, dtype=torch.int32)
        table[:, held] = (1 + torch.randperm(num_blocks - 1)).int().view(num_seqs, -1)
        table = table.to(query.device)
        request = torch.arange(num_seqs, dtype=torch.int32, device=query.device)
        seq_len, thin = torch.full_like(request, context), torch.full_like(request, spans)
        splits = decode_splits(num_seqs, num_heads, num_kv_heads, context, plan, query.device)
        workspace = make_workspace(num_seqs, num_heads, head_size, splits, query.device)
        out = torch.empty_like(query)

        def run() -> None:
            decode_attention(
                query, cache, table, request, seq_len, thin, plan, head_size**-0.5, out,
                workspace=workspace,
            )  # fmt: skip

        dense = context - spans * plan.span_tokens
        per_token = plan.key_bytes_per_token_head + plan.value_bytes_per_token_head
        read = spans * plan.span_tokens * per_token + dense * plan.dense_bytes_per_token_head
        return Kernel(run, int(num_seqs * num_kv_heads * read))

    return make


def makers_of(options: argparse.Namespace) -> dict[str, Maker]:
    """All kernels that were asked for, by title."""
    makers = {name: RIVALS[name] for name in RIVALS if name not in options.without}
    for name in options.formats:
        for ratio in options.ratios:
            if ratio or name != "none":
                plan = plan_of(name, ratio, options.head_size)
                makers[f"{name} {ratio:g}"] = think_kernel(plan)
    return makers


def measure(
    batch: int, context: int, makers: dict[str, Maker], options: argparse.Namespace
) -> dict[str, Any]:
    """All kernels at one batch and context."""
    shape = (batch, options.heads, options.head_size)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    size = memory_needed(batch, context, options.kv_heads, options.head_size)
    memory = random_memory(size)
    kernels: dict[str, Kernel] = {}
    errors: dict[str, str] = {}
    for title, make in makers.items():
        try:
            kernel = make(query, options.kv_heads, context, memory)
            kernel.run()
            torch.cuda.synchronize()
        except Exception as error:  # whatever another's kernel raises
            errors[title] = f"{type(error).__name__}: {error}"
        else:
            kernels[title] = kernel
    times = time_in_turns({name: kernel.run for name, kernel in kernels.items()}, options.rounds)
    read = {name: kernel.num_bytes for name, kernel in kernels.items()}
    return {
        "batch": batch, "context": context, "microseconds": times, "bytes": read, "errors": errors,
    }  # fmt: skip


def table_of(result: dict[str, Any], bandwidth: float) -> str:
    """One batch and context as Markdown."""
    times, read = result["microseconds"], result["bytes"]
    rows = [
        [name, f"{took:.1f}", f"{1e8 * read[name] / bandwidth / took:.0f} %"]
        for name, took in times.items()
    ]
    text = f"\nbatch {result['batch']}, context {result['context']}\n\n"
    text += table(["kernel", "us", "of the byte ideal"], rows) + "\n"
    return text + "".join(f"\n{name}: {error}\n" for name, error in result["errors"].items())


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 128])
    parser.add_argument("--contexts", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--max-tokens", type=int, default=2**22, help="batch * context at most")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.4, 0.5])
    parser.add_argument("--without", nargs="*", choices=RIVALS, default=[])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    return parser


def main() -> None:
    """Print a table per batch and context, and write everything as JSON."""
    options = make_parser().parse_args()
    torch.manual_seed(0)
    bandwidth = measure_bandwidth()
    machine = gpu_machine() | {
        "flash_attention": flash_version(options.head_size),
        "copy_bytes_per_second": bandwidth,
    }
    print(machine)
    makers = makers_of(options)
    results = []
    for batch in options.batches:
        for context in options.contexts:
            if batch * context > options.max_tokens:
                continue
            results.append(measure(batch, context, makers, options))
            print(table_of(results[-1], bandwidth), flush=True)
            torch.cuda.empty_cache()
            if options.out is not None:
                write_json(options.out, {"machine": machine, "results": results})


if __name__ == "__main__":
    main()
