"""The compiled part of decode attention; ``decode.py`` calls it.

All arrays are flat, all offsets count elements. A **split** is a run of whole blocks of one
row's context, an **item** is a split of one KV head.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from think_vllm.kernels.cpu.compiling import kernel
from think_vllm.kernels.cpu.elements import element_to_float32, float32_to_element
from think_vllm.kernels.cpu.softmax import LOWEST, cap_row, exp, exp_row, row_max
from think_vllm.kernels.cpu.threads import fetch_add
from think_vllm.kernels.cpu.tiles import LANES, add_products


class Shape(NamedTuple):
    """Sizes, offsets and strides, all int64 and in elements unless they say bytes."""

    kv_heads: int
    group: int
    head_size: int
    query_stride: int
    out_stride: int
    table_stride: int
    block_stride: int
    run_stride: int
    block_size: int
    span_blocks: int
    thin_blocks: int
    thin_tokens: int
    key_channels: int
    thin_values: int
    itemsize: int
    table_offset_bytes: int
    split_blocks: int
    split_columns: int


class Inputs(NamedTuple):
    """The arrays that are read."""

    query: Any
    kv: Any
    kv_bytes: Any
    block_table: Any
    request: Any
    seq_len: Any
    thin_spans: Any


class Partials(NamedTuple):
    """Results per split: output sums [Hq, D], score maxima and weight sums [Hq]."""

    sums: Any
    tops: Any
    totals: Any


@kernel(parallel=True)
def attend(threads: int, inputs: Any, scale: Any, cap: Any, out: Any, shape: Any) -> None:
    """Attend with every row and write ``out``."""
    seq_len = inputs.seq_len
    first_split, row_of_split = _plan_splits(seq_len, inputs.thin_spans, shape)
    num_splits, num_heads = len(row_of_split), shape.kv_heads * shape.group
    partials = Partials(
        np.empty(num_splits * num_heads * shape.head_size, np.float32),
        np.empty(num_splits * num_heads, np.float32),
        np.empty(num_splits * num_heads, np.float32),
    )
    # Items drawn, then per (row, KV head) the splits that are done.
    counters = np.zeros(1 + len(seq_len) * shape.kv_heads, np.int64)
    for row in range(len(seq_len)):
        if seq_len[row] == 0:
            start = row * shape.out_stride
            out[start : start + num_heads * shape.head_size] = 0
    for _ in prange(threads):
        _work(inputs, scale, cap, out, shape, first_split, row_of_split, partials, counters)


@njit
def _plan_splits(seq_len: Any, thin_spans: Any, shape: Any) -> Any:
    """First split of every row, and behind the last one the end; the row of every split."""
    num_rows = len(seq_len)
    first_split = np.zeros(num_rows + 1, np.int64)
    for row in range(num_rows):
        blocks = _count_blocks(seq_len[row], thin_spans[row], shape)
        splits = (blocks + shape.split_blocks - 1) // shape.split_blocks
        first_split[row + 1] = first_split[row] + splits
    row_of_split = np.empty(first_split[num_rows], np.int64)
    for row in range(num_rows):
        row_of_split[first_split[row] : first_split[row + 1]] = row
    return first_split, row_of_split


@njit
def _count_blocks(seq_len: int, thin_spans: int, shape: Any) -> Any:
    """Blocks that hold a context."""
    dense = seq_len - thin_spans * shape.span_blocks * shape.block_size
    return thin_spans * shape.thin_blocks + (dense + shape.block_size - 1) // shape.block_size


@njit
def _find_block(block: int, seq_len: int, thin_spans: int, shape: Any) -> Any:
    """Row entry of a context's ``block``-th block, and the tokens in it."""
    thin = thin_spans * shape.thin_blocks
    if block < thin:
        span, k = block // shape.thin_blocks, block % shape.thin_blocks
        left = shape.span_blocks * shape.block_size - k * shape.thin_tokens
        return span * shape.span_blocks + k, min(left, shape.thin_tokens)
    entry = thin_spans * shape.span_blocks + block - thin
    return entry, min(seq_len - entry * shape.block_size, shape.block_size)


@njit
def _whole_lanes(tokens: int) -> int:
    return (tokens + LANES - 1) // LANES * LANES


@njit
def _work(
    inputs: Any,
    scale: Any,
    cap: Any,
    out: Any,
    shape: Any,
    first_split: Any,
    row_of_split: Any,
    partials: Any,
    counters: Any,
) -> None:
    """Draw items until there are none left. One thread runs this."""
    queries = np.empty(2 * shape.group * shape.head_size, np.float32)
    scores = np.empty(shape.group * shape.split_columns, np.float32)
    runs = np.empty(shape.split_blocks, np.int64)
    tokens = np.empty(shape.split_blocks, np.int64)
    num_items = len(row_of_split) * shape.kv_heads
    item = fetch_add(counters, 0)
    while item < num_items:
        split, kv_head = item // shape.kv_heads, item % shape.kv_heads
        row = row_of_split[split]
        first, end = first_split[row], first_split[row + 1]
        begin = (split - first) * shape.split_blocks
        num_blocks, num_thin = _find_blocks(inputs, row, begin, kv_head, runs, tokens, shape)
        _load_queries(inputs.query, row, kv_head, scale, queries, shape)
        _score(inputs, begin, runs, tokens, num_blocks, num_thin, cap, queries, scores, shape)
        head = (split * shape.kv_heads + kv_head) * shape.group
        _soften(scores, tokens, num_blocks, head, partials, shape)
        _sum_values(inputs.kv, runs, tokens, num_blocks, num_thin, scores, head, partials, shape)
        if fetch_add(counters, 1 + row * shape.kv_heads + kv_head) == end - first - 1:
            _combine(first, end, row, kv_head, partials, out, shape)
        item = fetch_add(counters, 0)


@njit
def _find_blocks(
    inputs: Any, row: int, begin: int, kv_head: int, runs: Any, tokens: Any, shape: Any
) -> Any:
    """Write where the runs of the split that starts at block ``begin`` are, and their tokens.

    Returns:
        How many blocks there are, and how many of them are thin; those come first.
    """
    seq_len, thin_spans = np.int64(inputs.seq_len[row]), np.int64(inputs.thin_spans[row])
    end = min(begin + shape.split_blocks, _count_blocks(seq_len, thin_spans, shape))
    table_row = np.int64(inputs.request[row]) * shape.table_stride
    for i in range(end - begin):
        entry, tokens[i] = _find_block(begin + i, seq_len, thin_spans, shape)
        block = np.int64(inputs.block_table[table_row + entry])
        runs[i] = block * shape.block_stride + kv_head * shape.run_stride
    num_thin = thin_spans * shape.thin_blocks - begin
    return end - begin, min(max(num_thin, 0), end - begin)


@njit
def _load_queries(query: Any, row: int, kv_head: int, scale: Any, queries: Any, shape: Any) -> None:
    """Scale the group's queries, in float32, into the first half of ``queries``."""
    width = shape.group * shape.head_size
    start = row * shape.query_stride + kv_head * width
    # Slices, because an index that might be negative would keep LLVM from vectorizing.
    elements = query[start : start + width]
    for x in range(width):
        queries[x] = element_to_float32(elements[x]) * scale


@njit
def _gather_queries(kv_bytes: Any, run: int, queries: Any, shape: Any) -> None:
    """Gather the queries through a thin block's table into the second half of ``queries``."""
    start = run * shape.itemsize + shape.table_offset_bytes
    table = kv_bytes[start : start + shape.key_channels]
    for head in range(shape.group):
        whole = queries[head * shape.head_size : (head + 1) * shape.head_size]
        gathered = queries[(shape.group + head) * shape.head_size :]
        for i in range(len(table)):
            gathered[i] = whole[table[i]]


@njit
def _score(
    inputs: Any,
    begin: int,
    runs: Any,
    tokens: Any,
    num_blocks: int,
    num_thin: int,
    cap: Any,
    queries: Any,
    scores: Any,
    shape: Any,
) -> None:
    """Scores [G, columns] of a split; every block starts at a multiple of LANES columns."""
    scores[:] = np.float32(0.0)
    x = 0
    for i in range(num_blocks):
        if i < num_thin:
            # The blocks of a span share one table, and a split may start inside a span.
            if i == 0 or (begin + i) % shape.thin_blocks == 0:
                _gather_queries(inputs.kv_bytes, runs[i], queries, shape)
            factors = shape.group * shape.head_size
            num_rows, row_stride = shape.key_channels, shape.thin_tokens
        else:
            factors, num_rows, row_stride = 0, shape.head_size, shape.block_size
        # The last block's successor are the first one's values.
        following = runs[i + 1] if i + 1 < num_blocks else _values(runs, 0, num_thin, shape)
        columns = _whole_lanes(tokens[i])
        add_products(
            scores, x, shape.split_columns, queries, factors, shape.head_size,
            inputs.kv, runs[i], row_stride, num_rows, shape.group, columns, following - runs[i],
        )  # fmt: skip
        for head in range(shape.group):
            start = head * shape.split_columns + x
            if cap > 0:
                cap_row(scores[start : start + tokens[i]], cap)
            for padding in range(start + tokens[i], start + columns):
                scores[padding] = LOWEST
        x += columns


@njit
def _values(runs: Any, i: int, num_thin: int, shape: Any) -> Any:
    """Offset of the values of a split's ``i``-th block."""
    return runs[i] + (shape.thin_values if i < num_thin else shape.head_size * shape.block_size)


@njit
def _soften(
    scores: Any, tokens: Any, num_blocks: int, first_head: int, partials: Any, shape: Any
) -> None:
    """Scores -> weights that have yet to be divided by their sum."""
    columns = 0
    for i in range(num_blocks):
        columns += _whole_lanes(tokens[i])
    for head in range(shape.group):
        start = head * shape.split_columns
        row = scores[start : start + columns]
        top = row_max(row)
        partials.tops[first_head + head] = top
        partials.totals[first_head + head] = exp_row(row, top)


@njit
def _sum_values(
    kv: Any,
    runs: Any,
    tokens: Any,
    num_blocks: int,
    num_thin: int,
    weights: Any,
    first_head: int,
    partials: Any,
    shape: Any,
) -> None:
    """Weighted sums [G, D] of a split's values."""
    sums, start = partials.sums, first_head * shape.head_size
    sums[start : start + shape.group * shape.head_size] = np.float32(0.0)
    x = 0
    for i in range(num_blocks):
        values = _values(runs, i, num_thin, shape)
        following = _values(runs, min(i + 1, num_blocks - 1), num_thin, shape)
        add_products(
            sums, start, shape.head_size, weights, x, shape.split_columns,
            kv, values, shape.head_size, tokens[i], shape.group, shape.head_size,
            following - values,
        )  # fmt: skip
        x += _whole_lanes(tokens[i])


@njit
def _combine(
    first: int, end: int, row: int, kv_head: int, partials: Any, out: Any, shape: Any
) -> None:
    """Weigh a row's splits ``first .. end - 1`` against each other and write its output."""
    num_heads, head_size = shape.kv_heads * shape.group, shape.head_size
    result = np.empty(head_size, np.float32)
    for head in range(kv_head * shape.group, (kv_head + 1) * shape.group):
        top = partials.tops[first * num_heads + head]
        for split in range(first + 1, end):
            other = partials.tops[split * num_heads + head]
            top = other if other > top else top
        result[:] = np.float32(0.0)
        total = np.float32(0.0)
        for split in range(first, end):
            weight = exp(partials.tops[split * num_heads + head] - top)
            total += weight * partials.totals[split * num_heads + head]
            start = (split * num_heads + head) * head_size
            sums = partials.sums[start : start + head_size]
            for d in range(head_size):
                result[d] += weight * sums[d]
        start = row * shape.out_stride + head * head_size
        elements = out[start : start + head_size]
        for d in range(head_size):
            elements[d] = float32_to_element(result[d] / total, elements[d])
