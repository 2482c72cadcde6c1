"""One kernel by itself, for a profiler or a sanitizer: ``kernel.py FORMAT`` or ``compaction``.

``FORMAT`` is decode attention at batch 64 and 8k tokens, half of the key channels pruned, a few
times. ``compaction`` compacts the same cache again and again, which must give the same bytes each
time.
"""

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.gpu_attention import memory_needed, random_memory, think_kernel
from bench.support.plans import plan_of
from csrc_triton.compact import compact_spans
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan

HEADS = (32, 8)
HEAD_SIZE = 128
BATCH = 64
CONTEXT = 8192
LAUNCHES = 4
COMPACTION = "compaction"


def attend(quant: str) -> None:
    """Launch decode attention."""
    query = torch.randn(BATCH, HEADS[0], HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
    memory = random_memory(memory_needed(BATCH, CONTEXT, HEADS[1], HEAD_SIZE))
    kernel = think_kernel(plan_of(quant))(query, HEADS[1], CONTEXT, memory)
    for _ in range(LAUNCHES):
        kernel.run()
    torch.cuda.synchronize()


def compact_again(plan: BlockPlan, times: int, device: torch.device, spans: int = 8) -> int:
    """Compact the same spans again and again.

    Args:
        plan: How blocks are laid out.
        times: Often.
        device: Of tensors.
        spans: How many, each of a request of its own.

    Returns:
        How many runs gave other bytes than the first one: 0, unless there is a race.
    """
    num_kv_heads = HEADS[1]
    shape = (spans * plan.span_blocks + 1, num_kv_heads, plan.block_size, 2 * plan.head_size)
    before = torch.randn(shape, dtype=torch.float32, device=device).to(torch.bfloat16)
    order = 1 + torch.randperm(spans * plan.span_blocks, device=device)
    table = order.to(torch.int32).view(spans, -1)
    request = torch.arange(spans, device=device, dtype=torch.int32)
    scores = torch.rand(spans, num_kv_heads, plan.head_size, device=device)
    kept = scores.argsort(dim=2)[..., : plan.kept_channels].sort(dim=2).values.to(torch.uint8)
    results = []
    for _ in range(times + 1):
        cache = before.clone()
        compact_spans(cache, table, request, torch.zeros_like(request), kept, plan)
        results.append(cache.view(torch.int16))
    return sum(not torch.equal(results[0], other) for other in results[1:])


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*FORMATS, COMPACTION])
    parser.add_argument("--times", type=int, default=20, help="of compaction")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kernel; 1 if compaction did not repeat itself."""
    options = make_parser().parse_args(arguments)
    if options.what != COMPACTION:
        attend(options.what)
        return 0
    bad = 0
    for quant in FORMATS:
        torch.manual_seed(0)
        other = compact_again(plan_of(quant), options.times, torch.device("cuda"))
        print(f"{quant}: {other} of {options.times} runs gave other bytes", flush=True)
        bad += other
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
