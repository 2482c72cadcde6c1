"""Rewrite spans of dense blocks as thin blocks."""

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from think_vllm.kernels.cpu.blocks import view_blocks
from think_vllm.kernels.cpu.checks import check_cache, check_tasks
from think_vllm.kernels.cpu.compiling import kernel
from think_vllm.kernels.cpu.elements import copy_elements, flat_elements, flat_indices
from think_vllm.kernels.cpu.quantize import put_matrix
from think_vllm.kernels.cpu.threads import choose_threads, fetch_add
from think_vllm.plan.planner import BlockPlan


def compact_spans(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: npt.NDArray[np.int32],
    span: npt.NDArray[np.int32],
    channels: torch.Tensor,
    plan: BlockPlan,
) -> None:
    """Rewrite spans in place: dense blocks become thin ones in the span's first blocks.

    Plain elements are moved, never converted; other encodings follow ``reference/quantization.py``
    to the bit. Bytes that the thin layout leaves unused keep what they held.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free. Written.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        span: ``[n]`` int32. Span of that request; no two tasks may share a block.
        channels: ``[n, Hk, K]`` uint8. Kept channels of keys, all if none is pruned, then of values
            if some are pruned; ascending.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "compact_spans"
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, span, "span")
    num_tasks, num_kv_heads = len(request), kv_cache.shape[1]
    expected = (num_tasks, num_kv_heads, plan.kept_channels)
    if channels.shape != expected or channels.dtype != torch.uint8:
        raise ValueError(
            f"{who}: channels is {channels.dtype} {tuple(channels.shape)}; expected uint8 "
            f"[tasks, Hk, plan.kept_channels] = {expected}"
        )
    if num_tasks == 0:
        return
    channels_moved = plan.key_channels + plan.value_channels
    moved = num_tasks * num_kv_heads * plan.span_tokens * channels_moved
    _compact(
        choose_threads(moved),
        flat_elements(block_table),
        flat_indices(request),
        flat_indices(span),
        flat_elements(channels.contiguous()),
        *view_blocks(kv_cache, block_table, plan),
    )


@kernel(parallel=True)
def _compact(threads, table, request, span, channels, cache, shape, keys, values):
    counters = np.zeros(1, np.int64)
    for _ in prange(threads):
        _work(table, request, span, channels, cache, shape, keys, values, counters)


@njit
def _work(table, request, span, channels, cache, shape, keys, values, counters):
    """Draw (task, KV head) items until there are none left."""
    span_tokens = shape.span_blocks * shape.block_size
    # Sources are overwritten, so a span passes through scratch: keys [C, s * N], then values
    # [s * N, V].
    size = span_tokens * (shape.key_channels + shape.value_channels)
    scratch = np.empty(size, cache.elements.dtype)
    floats = np.empty(max(shape.thin_tokens, shape.head_size), np.float32)
    num_items = len(request) * shape.kv_heads
    item = fetch_add(counters, 0)
    while item < num_items:
        task, kv_head = item // shape.kv_heads, item % shape.kv_heads
        entry = request[task] * shape.table_stride + span[task] * shape.span_blocks
        kept = item * shape.kept_channels
        _take_span(cache, table, entry, kv_head, channels, kept, scratch, shape)
        for k in range(shape.thin_blocks):
            run = table[entry + k] * shape.block_stride + kv_head * shape.run_stride
            _put_block(cache, run, k, channels, kept, scratch, floats, shape, keys, values)
        item = fetch_add(counters, 0)


@njit
def _take_span(cache, table, entry, kv_head, channels, kept, scratch, shape):
    """Dense blocks -> scratch, kept channels only."""
    N, D, C = shape.block_size, shape.head_size, shape.key_channels
    kv, span_tokens = cache.elements, shape.span_blocks * N
    for b in range(shape.span_blocks):
        run = table[entry + b] * shape.block_stride + kv_head * shape.run_stride
        for i in range(C):
            channel = np.int64(channels[kept + i])
            copy_elements(scratch, i * span_tokens + b * N, kv, run + channel * N, N)
        if shape.value_channels_offset >= 0:
            at = C * span_tokens + b * N * shape.value_channels
            _take_values(scratch, at, kv, run + D * N, channels, kept + C, shape)
        else:
            copy_elements(scratch, C * span_tokens + b * N * D, kv, run + D * N, N * D)


@njit
def _take_values(scratch, at, kv, start, channels, kept, shape):
    """The values of a dense block -> scratch, kept channels only."""
    V = shape.value_channels
    table = channels[kept : kept + V]
    for token in range(shape.block_size):
        whole = kv[start + token * shape.head_size : start + (token + 1) * shape.head_size]
        taken = scratch[at + token * V : at + (token + 1) * V]
        for i in range(V):
            taken[i] = whole[table[i]]


@njit
def _put_block(cache, run, k, channels, kept, scratch, floats, shape, keys, values):
    """Scratch -> the span's ``k``-th thin block."""
    C, V = shape.key_channels, shape.value_channels
    span_tokens = shape.span_blocks * shape.block_size
    first = k * shape.thin_tokens
    count = min(shape.thin_tokens, span_tokens - first)
    put_matrix(cache, run, keys, shape.itemsize, scratch, first, span_tokens, C, count, floats)
    start = C * span_tokens + first * V
    put_matrix(cache, run, values, shape.itemsize, scratch, start, V, count, V, floats)
    if shape.channels_offset >= 0:
        table_at = run * shape.itemsize + shape.channels_offset
        for i in range(C):
            cache.bytes[table_at + i] = channels[kept + i]
    if shape.value_channels_offset >= 0:
        table_at = run * shape.itemsize + shape.value_channels_offset
        for i in range(V):
            cache.bytes[table_at + i] = channels[kept + C + i]
