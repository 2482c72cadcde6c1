"""Rewrite spans of dense blocks as thin blocks, and read the tables of those."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from think_vllm.kernels.cpu.checks import check_cache, check_tasks
from think_vllm.kernels.cpu.compiling import kernel
from think_vllm.kernels.cpu.elements import copy_elements, flat_elements, flat_indices
from think_vllm.kernels.cpu.threads import choose_threads, fetch_add
from think_vllm.planner import BlockPlan


class _Shape(NamedTuple):
    """What the kernel needs to know, all int64. Offsets and strides count elements."""

    kv_heads: int
    head_size: int
    table_stride: int
    block_stride: int
    run: int
    block_size: int
    span_blocks: int
    thin_blocks: int
    thin_tokens: int
    key_channels: int
    thin_values: int
    itemsize: int
    table_offset: int


def compact_spans(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: npt.NDArray[np.int32],
    span: npt.NDArray[np.int32],
    channels: torch.Tensor,
    plan: BlockPlan,
) -> None:
    """Rewrite spans in place: dense blocks become thin ones in the span's first blocks.

    Elements are moved, never converted. Bytes that the thin layout leaves unused keep what
    they held.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free. Written.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        span: ``[n]`` int32. Span of that request; no two tasks may share a block.
        channels: ``[n, Hk, C]`` uint8. Kept channels, ascending.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "compact_spans"
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, span, "span")
    num_tasks, num_kv_heads = len(request), kv_cache.shape[1]
    expected = (num_tasks, num_kv_heads, plan.key_channels)
    if channels.shape != expected or channels.dtype != torch.uint8:
        raise ValueError(
            f"{who}: channels is {channels.dtype} {tuple(channels.shape)}; expected uint8 "
            f"[tasks, Hk, plan.key_channels] = {expected}"
        )
    if num_tasks == 0:
        return
    shape = _Shape(
        kv_heads=num_kv_heads,
        head_size=plan.head_size,
        table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0),
        run=kv_cache.stride(1),
        block_size=plan.block_size,
        span_blocks=plan.span_blocks,
        thin_blocks=plan.thin_blocks,
        thin_tokens=plan.thin_block_tokens,
        key_channels=plan.key_channels,
        thin_values=plan.layout.values_offset // plan.itemsize,
        itemsize=plan.itemsize,
        table_offset=plan.layout.table_offset,
    )
    moved = num_tasks * num_kv_heads * plan.span_tokens * (plan.key_channels + plan.head_size)
    kv_bytes = flat_elements(kv_cache).view(np.uint8)
    _compact(
        choose_threads(moved),
        kv_bytes.view(np.uint16 if plan.itemsize == 2 else np.uint32),
        kv_bytes,
        flat_elements(block_table),
        flat_indices(request),
        flat_indices(span),
        flat_elements(channels.contiguous()),
        shape,
    )


def read_channels(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: npt.NDArray[np.int32],
    span: npt.NDArray[np.int32],
    plan: BlockPlan,
) -> torch.Tensor:
    """Read the channel tables of thin spans, from each span's first block.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        span: ``[n]`` int32. Thin span of that request.
        plan: How blocks are laid out.

    Returns:
        ``[n, Hk, C]`` uint8, a copy.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "read_channels"
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, span, "span")
    entry = np.asarray(span, np.int64) * plan.span_blocks
    blocks = block_table[torch.from_numpy(np.asarray(request, np.int64)), torch.from_numpy(entry)]
    start = plan.layout.table_offset
    runs = kv_cache.flatten(2).view(torch.uint8)
    return runs[:, :, start : start + plan.key_channels][blocks.long()]


@kernel(parallel=True)
def _compact(
    threads: int,
    kv: Any,
    kv_bytes: Any,
    table: Any,
    request: Any,
    span: Any,
    channels: Any,
    shape: Any,
) -> None:
    counters = np.zeros(1, np.int64)
    for _ in prange(threads):
        _work(kv, kv_bytes, table, request, span, channels, shape, counters)


@njit
def _work(
    kv: Any,
    kv_bytes: Any,
    table: Any,
    request: Any,
    span: Any,
    channels: Any,
    shape: Any,
    counters: Any,
) -> None:
    """Draw (task, KV head) items until there are none left."""
    span_tokens = shape.span_blocks * shape.block_size
    # Sources are overwritten, so a span passes through scratch: keys [C, s * N], values after.
    scratch = np.empty(span_tokens * (shape.key_channels + shape.head_size), kv.dtype)
    num_items = len(request) * shape.kv_heads
    item = fetch_add(counters, 0)
    while item < num_items:
        task, kv_head = item // shape.kv_heads, item % shape.kv_heads
        entry = request[task] * shape.table_stride + span[task] * shape.span_blocks
        kept = item * shape.key_channels
        _take_span(kv, table, entry, kv_head, channels, kept, scratch, shape)
        _put_span(kv, kv_bytes, table, entry, kv_head, channels, kept, scratch, shape)
        item = fetch_add(counters, 0)


@njit
def _take_span(
    kv: Any,
    table: Any,
    entry: int,
    kv_head: int,
    channels: Any,
    kept: int,
    scratch: Any,
    shape: Any,
) -> None:
    """Dense blocks -> scratch, kept channels only."""
    N, D, C = shape.block_size, shape.head_size, shape.key_channels
    span_tokens = shape.span_blocks * N
    for b in range(shape.span_blocks):
        run = table[entry + b] * shape.block_stride + kv_head * shape.run
        for i in range(C):
            channel = np.int64(channels[kept + i])
            copy_elements(scratch, i * span_tokens + b * N, kv, run + channel * N, N)
        copy_elements(scratch, C * span_tokens + b * N * D, kv, run + D * N, N * D)


@njit
def _put_span(
    kv: Any,
    kv_bytes: Any,
    table: Any,
    entry: int,
    kv_head: int,
    channels: Any,
    kept: int,
    scratch: Any,
    shape: Any,
) -> None:
    """Scratch -> thin blocks."""
    D, C = shape.head_size, shape.key_channels
    span_tokens = shape.span_blocks * shape.block_size
    for k in range(shape.thin_blocks):
        run = table[entry + k] * shape.block_stride + kv_head * shape.run
        first = k * shape.thin_tokens
        count = min(shape.thin_tokens, span_tokens - first)
        for i in range(C):
            copy_elements(kv, run + i * shape.thin_tokens, scratch, i * span_tokens + first, count)
        copy_elements(kv, run + shape.thin_values, scratch, C * span_tokens + first * D, count * D)
        start = run * shape.itemsize + shape.table_offset
        for i in range(C):
            kv_bytes[start + i] = channels[kept + i]
