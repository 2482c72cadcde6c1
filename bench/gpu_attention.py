"""Decode attention on an NVIDIA GPU: every format, beside FlashAttention, torch and the memory.

For each batch and context: our kernels over thin blocks, vLLM's FlashAttention over its own bf16
cache where it can be imported, torch's attention over contiguous keys and values, and the time in
which the machine copies as many bytes as each format holds (measured, half of a device-to-device
copy's read and write). Kernels take turns, so that each round meets the same clocks; medians of
rounds, timed with events after the L2 cache has been overwritten.

Writes JSON with date, GPU and versions. Run: ``python -m bench.gpu_attention --out FILE.json``.
"""

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from csrc_triton.decode import choose_splits, decode_attention, make_workspace
from think_vllm import __version__
from think_vllm.config import ThinkConfig
from think_vllm.formats import FORMATS
from think_vllm.planner import BlockPlan, plan_blocks

L2_BYTES = 256 * 2**20  # larger than any L2 cache
COPY_BYTES = 2 * 2**30
WARM_UPS = 3
#: For how long the GPU idles before a kernel, so that the host has enqueued all of it by then.
IDLE_CYCLES = 1_000_000


def time_in_turns(kernels: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each kernel in microseconds."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in kernels}
    for round_ in range(rounds + WARM_UPS):
        for name, run in kernels.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(IDLE_CYCLES)
            start.record()
            run()
            end.record()
            end.synchronize()
            if round_ >= WARM_UPS:
                times[name].append(1e3 * start.elapsed_time(end))
    return {name: statistics.median(measured) for name, measured in times.items()}


def measure_bandwidth() -> float:
    """Bytes per second that the GPU reads and writes while it copies."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    took = time_in_turns({"copy": lambda: target.copy_(source)}, 11)["copy"]
    return 2 * COPY_BYTES / (took * 1e-6)


def think_kernel(
    query: torch.Tensor, num_kv_heads: int, context: int, plan: BlockPlan
) -> tuple[Callable[[], None], int]:
    """Our decode attention, and the bytes that it has to read.

    The cache holds random bytes: speed does not depend on what they spell.
    """
    num_seqs, _, head_size = query.shape
    width = -(-context // plan.block_size)
    spans = plan.rule.prompt_spans(context)
    freed = plan.span_blocks - plan.thin_blocks
    num_blocks = num_seqs * (width - spans * freed) + 1
    shape = (num_blocks, num_kv_heads, plan.block_size, 2 * head_size)
    # As bytes from the start: int64 would take eight times the memory.
    size = (*shape[:3], shape[3] * plan.itemsize)
    cache = torch.randint(0, 64, size, dtype=torch.uint8, device="cuda").view(query.dtype)
    # Row entries behind a span's thin blocks are null, as vLLM's manager leaves them.
    position = torch.arange(width)
    held = (position >= spans * plan.span_blocks) | (position % plan.span_blocks < plan.thin_blocks)
    order = (1 + torch.randperm(num_blocks - 1)).to(torch.int32).view(num_seqs, -1)
    table = torch.zeros(num_seqs, width, dtype=torch.int32)
    table[:, held] = order
    table = table.cuda()
    request = torch.arange(num_seqs, dtype=torch.int32, device="cuda")
    seq_len, thin = torch.full_like(request, context), torch.full_like(request, spans)
    splits = choose_splits(num_seqs, num_kv_heads, context)
    workspace = make_workspace(num_seqs, query.shape[1], head_size, splits, query.device)
    out = torch.empty_like(query)

    def run() -> None:
        decode_attention(
            query, cache, table, request, seq_len, thin, plan, head_size**-0.5, out,
            workspace=workspace,
        )  # fmt: skip

    dense = context - spans * plan.span_tokens
    per_token = plan.key_bytes_per_token_head + plan.value_bytes_per_token_head
    thin_bytes = spans * plan.span_tokens * per_token
    read = thin_bytes + dense * plan.dense_bytes_per_token_head
    return run, int(num_seqs * num_kv_heads * read)


def torch_kernel(query: torch.Tensor, num_kv_heads: int, context: int) -> Callable[[], Any]:
    """Torch's attention over contiguous keys and values."""
    num_seqs, _, head_size = query.shape
    shape = (num_seqs, num_kv_heads, context, head_size)
    keys, values = (torch.randn(shape, device="cuda", dtype=query.dtype) for _ in range(2))
    attention = torch.nn.functional.scaled_dot_product_attention
    return lambda: attention(query[:, :, None], keys, values, enable_gqa=True)


def flash_version(head_size: int) -> int | None:
    """Version of FlashAttention that vLLM takes on this GPU; its function defaults to 2."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    except ImportError:
        return None
    version: int | None = get_flash_attn_version(head_size=head_size)
    return version


def flash_kernel(query: torch.Tensor, num_kv_heads: int, context: int) -> Callable[[], Any] | None:
    """FlashAttention of vLLM over its paged bf16 cache; None where it cannot be imported."""
    version = flash_version(query.shape[2])
    if version is None:
        return None
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    num_seqs, _, head_size = query.shape
    width = -(-context // 16)
    shape = (num_seqs * width, 16, num_kv_heads, head_size)
    keys, values = (torch.randn(shape, device="cuda", dtype=query.dtype) for _ in range(2))
    table = torch.randperm(num_seqs * width, device="cuda").to(torch.int32).view(num_seqs, width)
    starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((num_seqs,), context, dtype=torch.int32, device="cuda")
    return lambda: flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=context,
        seqused_k=lengths,
        block_table=table,
        causal=True,
        fa_version=version,
    )


def measure(batch: int, context: int, options: argparse.Namespace) -> dict[str, Any]:
    """All kernels at one batch and context."""
    shape = (batch, options.heads, options.head_size)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    kernels: dict[str, Callable[[], Any]] = {
        "torch": torch_kernel(query, options.kv_heads, context)
    }
    flash = flash_kernel(query, options.kv_heads, context)
    if flash is not None:
        kernels["FlashAttention"] = flash
    read = {}
    for name in FORMATS:
        for ratio in options.ratios:
            config = ThinkConfig.model_validate({"kv_channel_prune": ratio, "kv_quant": name})
            plan = plan_blocks(config, options.head_size, 2)
            if plan is not None:
                title = f"{name} {ratio:g}"
                kernels[title], read[title] = think_kernel(query, options.kv_heads, context, plan)
    times = time_in_turns(kernels, options.rounds)
    return {"batch": batch, "context": context, "microseconds": times, "bytes": read}


def main() -> None:
    """Print a table per batch and context, and write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--max-tokens", type=int, default=2**20, help="batch * context at most")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.0, 0.4, 0.5])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = measure_bandwidth()
    machine = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flash_attention": flash_version(options.head_size),
        "think_vllm": __version__,
        "copy_bytes_per_second": bandwidth,
    }
    print(machine)
    results = []
    for batch in options.batches:
        for context in options.contexts:
            if batch * context > options.max_tokens:
                continue
            result = measure(batch, context, options)
            results.append(result)
            print(f"\nbatch {batch}, context {context}\n")
            print("| kernel | us | of the byte ideal |\n| --- | --- | --- |")
            for name, took in result["microseconds"].items():
                ideal = 1e6 * result["bytes"].get(name, 0) / bandwidth
                share = f"{100 * ideal / took:.0f} %" if ideal else "-"
                print(f"| {name} | {took:.1f} | {share} |", flush=True)
            torch.cuda.empty_cache()
    if options.out is not None:
        text = json.dumps({"machine": machine, "results": results}, indent=2)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
