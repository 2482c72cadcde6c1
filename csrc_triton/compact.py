"""Rewrite spans of dense blocks as thin blocks.

A span's thin blocks take the place of its first dense blocks, so sources are overwritten. One
program has all blocks of one (span, KV head) and writes thin block after thin block. Thin blocks
hold more tokens than dense ones, so the ``k``-th takes its tokens from the ``k``-th dense block
and later ones: only the block in whose place it goes has to be kept elsewhere meanwhile, in the
program's own part of a workspace. Programs never touch each other's bytes.
"""

import torch
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides, find_run, make_layout
from csrc_triton.checks import check_tasks, check_tensor
from csrc_triton.gather import code_matrix
from csrc_triton.launch import kernel, whole_stride
from csrc_triton.quantization import element_pointer
from think_vllm.kernels.checks import check_cache
from think_vllm.plan.planner import BlockPlan

#: Programs at most: a few for each multiprocessor. They share out (span, KV head) items.
MAX_PROGRAMS = 512
#: Fewer where runs are long, so that the workspace stays within this.
MAX_WORKSPACE_BYTES = 32 * 2**20
#: Tasks among which a program looks for due ones at a time.
TASKS = 256
#: 4-byte words of a block that are set aside at a time.
WORDS = tl.constexpr(2048)
#: See ``csrc_triton/quantization.py`` for the fusion.
OPTIONS = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False, "maxnreg": 128}


def compact_workspace(plan: BlockPlan, device: torch.device) -> torch.Tensor:
    """Make a workspace for ``compact_spans``, whatever the number of its tasks.

    Returns:
        uint8, not initialized.
    """
    run_bytes = plan.layout.run_bytes
    programs = max(1, min(MAX_PROGRAMS, MAX_WORKSPACE_BYTES // run_bytes))
    return torch.empty(programs * run_bytes, dtype=torch.uint8, device=device)


def compact_spans(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    span: torch.Tensor,
    channels: torch.Tensor | None,
    plan: BlockPlan,
    *,
    layers: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
) -> None:
    """Rewrite spans in place: dense blocks become thin ones in the span's first blocks.

    Plain elements are moved, never converted; other encodings follow ``reference/quantization.py``
    to the bit. Bytes that the thin layout leaves unused keep what they held. The launch depends
    on shapes only, so it can be part of a CUDA graph.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free. Written.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        span: ``[n]`` int32. Span of that request; tasks whose span is negative are skipped, and
            no two others may share a block.
        channels: ``[n, Hk, K]`` uint8, with ``layers`` ``[L, n, Hk, K]``. Kept channels of keys,
            all if none is pruned, then of values if some are pruned; ascending. Not read, and may
            be None, if the plan prunes nothing.
        plan: How blocks are laid out.
        layers: ``[L]`` int64. Addresses of caches like ``kv_cache``, that of every layer to be
            compacted in this one launch; None for ``kv_cache`` alone.
        workspace: Made by ``compact_workspace``; None for a new one. Calls that can run at the
            same time need one each.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, device = "compact_spans", kv_cache.device
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, "span", span, device)
    num_tasks, num_heads, num_layers = request.numel(), kv_cache.shape[1], 1
    if layers is not None:
        num_layers = layers.numel()
        check_tensor(who, "layers", layers, torch.int64, (num_layers,), device)
    if plan.prunes:
        if channels is None:
            raise ValueError(
                f"{who}: channels is None; the plan keeps {plan.kept_channels} of them"
            )
        expected = (num_tasks, num_heads, plan.kept_channels)
        expected = expected if layers is None else (num_layers, *expected)
        check_tensor(who, "channels", channels, torch.uint8, expected, device)
    if num_tasks * num_layers == 0:
        return
    workspace = compact_workspace(plan, device) if workspace is None else workspace
    run_bytes = plan.layout.run_bytes
    if workspace.dtype != torch.uint8 or workspace.numel() < run_bytes:
        raise ValueError(
            f"{who}: workspace is {workspace.dtype} [{workspace.numel()}]; expected uint8 of at "
            f"least {run_bytes} bytes, see compact_workspace"
        )
    programs = min(num_tasks * num_heads * num_layers, workspace.numel() // run_bytes)
    compact_kernel[(programs,)](
        cache_bytes(kv_cache),
        request if layers is None else layers,
        block_table,
        request,
        span,
        request if channels is None else channels,
        workspace,
        num_tasks,
        num_heads,
        num_layers,
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        L=make_layout(plan, kv_cache.dtype),
        TASKS=TASKS,
        LAYERED=layers is not None,
        **OPTIONS,
    )


@kernel(unaligned=("table_ptr", "request_ptr", "span_ptr", "channel_ptr", "layer_ptr"))
def compact_kernel(
    kv_ptr, layer_ptr, table_ptr, request_ptr, span_ptr, channel_ptr, workspace_ptr,
    num_tasks, num_heads, num_layers, table_stride, block_stride, head_stride,
    L: tl.constexpr, TASKS: tl.constexpr, LAYERED: tl.constexpr,
):  # fmt: skip
    """Programs share out (due task, layer, KV head) items."""
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    RUN: tl.constexpr = 2 * L.N * L.D * (L.DTYPE.primitive_bitwidth // 8)
    KEPT: tl.constexpr = L.C + (L.V if L.VALUES.TABLE >= 0 else 0)
    aside = workspace_ptr + tl.program_id(0).to(tl.int64) * RUN
    per_task = num_heads * num_layers
    for start in range(0, num_tasks, TASKS):
        tasks = start + tl.arange(0, TASKS)
        due = tl.load(span_ptr + tasks, mask=tasks < num_tasks, other=-1) >= 0
        rank = tl.cumsum(due.to(tl.int32), axis=0)
        num_items = tl.sum(due.to(tl.int32), axis=0) * per_task
        for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
            # Due tasks are numbered from 0: as many tasks lie before one as have no higher rank.
            task = start + tl.sum((rank <= item // per_task).to(tl.int32), axis=0)
            layer, head = item % per_task // num_heads, item % num_heads
            base = kv_ptr
            if LAYERED:
                base = tl.load(layer_ptr + layer).to(tl.pointer_type(tl.uint8), bitcast=True)
                base = tl.multiple_of(base, 16)
            span = tl.load(span_ptr + task)
            request = tl.load(request_ptr + task).to(tl.int64)
            entries = table_ptr + request * table_stride + span * L.SPAN
            item_of_layers = (layer * num_tasks + task).to(tl.int64) * num_heads + head
            kept = channel_ptr + item_of_layers * KEPT
            key_table, value_table = kept, kept + L.C
            for k in range(L.THIN):
                run = find_run(base, tl.load(entries + k), head, block_stride, head_stride)
                # Are there tokens in this block that are still to be read?
                if k * L.T < (k + 1) * L.N:
                    source, target = element_pointer(run, 4), element_pointer(aside, 4)
                    for word in range(0, RUN // 4, WORDS):
                        words = word + tl.arange(0, WORDS)
                        moved = tl.load(source + words, mask=words < RUN // 4)
                        tl.store(target + words, moved, mask=words < RUN // 4)
                tl.debug_barrier()
                count = tl.minimum(L.T, L.SPAN * L.N - k * L.T)
                code_matrix(
                    run, base, aside, entries, key_table, k, head, block_stride, head_stride,
                    L.C, count, True, L,
                )  # fmt: skip
                code_matrix(
                    run, base, aside, entries, value_table, k, head, block_stride, head_stride,
                    count, L.V, False, L,
                )  # fmt: skip
                row = tl.arange(0, 256)
                if L.KEYS.TABLE >= 0:
                    table = tl.load(key_table + row, mask=row < L.C)
                    tl.store(run + L.KEYS.TABLE + row, table, mask=row < L.C)
                if L.VALUES.TABLE >= 0:
                    table = tl.load(value_table + row, mask=row < L.V)
                    tl.store(run + L.VALUES.TABLE + row, table, mask=row < L.V)
                # The next block must not be set aside before all threads have read this one.
                tl.debug_barrier()


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: one layer, and all layers at once."""
    cases = []
    for layered in (False, True):
        # Without layers, the launcher has another pointer for the kernel, which leaves it alone.
        pointers = {"kv": "u8", "channel": "u8", "workspace": "u8"}
        pointers |= {"layer": "i64"} if layered else {}
        constants = {"L": make_layout(plan, dtype), "TASKS": TASKS, "LAYERED": layered}
        cases.append(aot_case(compact_kernel, constants, OPTIONS, **pointers))
    return cases
