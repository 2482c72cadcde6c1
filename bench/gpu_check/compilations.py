"""Kernels that are compiled after warm-up: each keeps all requests waiting for up to seconds.

Warms up as an engine does, then launches every kernel with the numbers that serving brings: other
batches, block tables, prompts, chunks and layers. Exits with 1 if anything was compiled.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu_check.jit import counted_compilations
from bench.gpu_check.kernel import HEADS
from bench.gpu_check.machine import write_result
from bench.support.plans import plan_of
from csrc_triton.compact import compact_spans
from csrc_triton.context import context_attention
from csrc_triton.decode import decode_attention, decode_splits
from csrc_triton.scores import add_query_energy, key_energy
from csrc_triton.splits import make_workspace
from csrc_triton.store import store_dense
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.cuda.warmup import warm_up

#: Rows of a batch: 1, which Triton compiles in; multiples of 16, which it tells apart; neither.
BATCHES = (1, 2, 3, 16, 17, 64)
#: Spans in the block table of a request: its stride is a multiple of 16, or not.
WIDTHS = (1, 3, 16)
LAYERS = 2


def launch_all(plan: BlockPlan, heads: tuple[int, int], batch: int, spans: int,
               device: torch.device) -> None:  # fmt: skip
    """Launch every kernel of a plan once or more.

    Args:
        plan: How blocks are laid out.
        heads: ``Hq`` and ``Hk``.
        batch: Requests.
        spans: In the context of each of them.
        device: Of tensors.
    """
    num_heads, num_kv_heads = heads
    width = spans * plan.span_blocks
    dtype, size = torch.bfloat16, plan.head_size
    shape = (batch * width + 1, num_kv_heads, plan.block_size, 2 * size)
    layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(LAYERS)]
    cache = layers[0]
    table = torch.arange(1, batch * width + 1, dtype=torch.int32, device=device).view(batch, -1)
    request = torch.arange(batch, dtype=torch.int32, device=device)
    none = torch.zeros_like(request)
    tokens = spans * plan.span_tokens
    length = torch.full_like(request, tokens)
    scale = size**-0.5

    chunk = 5 * batch
    query = torch.zeros(chunk, num_heads, size, dtype=dtype, device=device)
    key = torch.zeros(chunk, num_kv_heads, size, dtype=dtype, device=device)
    slots = torch.arange(chunk, device=device)
    store_dense(key, key, cache, slots, plan)
    out = torch.empty_like(query)
    starts = 5 * torch.arange(batch + 1, dtype=torch.int32, device=device)
    for thin in (None, none):
        context_attention(
            query, cache, table, starts, length, request, plan, scale, out, 5, 0.0, thin
        )
    chosen = decode_splits(batch, num_heads, num_kv_heads, tokens, plan, device)
    for splits in {chosen, 2}:
        workspace = make_workspace(batch, num_heads, size, splits, device)
        decode_attention(
            query[:batch], cache, table, request, length, none, plan, scale, out[:batch],
            workspace=workspace,
        )  # fmt: skip
    channels = None
    if plan.prunes:
        energy = torch.zeros(batch, num_kv_heads, size, dtype=torch.float32, device=device)
        add_query_energy(query, starts[:-1], starts[1:], energy)
        if plan.prunes_keys:
            key_energy(cache, table, request, length, plan, max_tokens=tokens)
        row = torch.arange(plan.kept_channels, device=device).to(torch.uint8)
        channels = row.repeat(LAYERS, batch, num_kv_heads, 1)
    pointers = torch.tensor(
        [layer.data_ptr() for layer in layers], dtype=torch.int64, device=device
    )
    compact_spans(cache, table, request, none, channels, plan, layers=pointers)


def check(quant: str, ratio: float, device: torch.device) -> dict[str, int]:
    """Compilations after warm-up, by kernel, of one format."""
    plan = plan_of(quant, ratio)
    warm_up(plan, HEADS, torch.bfloat16, device)
    with counted_compilations() as compiled:
        for batch in BATCHES:
            for spans in WIDTHS:
                launch_all(plan, HEADS, batch, spans, device)
    return dict(compiled)


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write compilations of every format."""
    options = make_parser().parse_args(arguments)
    found: dict[str, dict[str, int]] = {}
    for quant in options.formats:
        found[quant] = check(quant, options.ratio, torch.device("cuda"))
        print(f"{quant}: {found[quant] or 'nothing was compiled after warm-up'}", flush=True)
        write_result(options.out, compilations=found)
    return 1 if any(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
