"""The compiled part of decode attention; ``decode.py`` calls it.

All arrays are flat, all offsets count elements. A **split** is a run of whole blocks of one
row's context, all thin or all dense; an **item** is a split of one KV head.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from think_vllm.kernels.cpu.compiling import kernel
from think_vllm.kernels.cpu.elements import element_to_float32, float32_to_element
from think_vllm.kernels.cpu.products import add_matrix
from think_vllm.kernels.cpu.softmax import LOWEST, cap_row, exp, exp_row, row_max
from think_vllm.kernels.cpu.splits import find_blocks, plan_splits, whole_lanes
from think_vllm.kernels.cpu.sums import sum_dense_values, sum_kept_values, sum_thin_values
from think_vllm.kernels.cpu.threads import fetch_add
from think_vllm.kernels.cpu.tiles import add_products


class Partials(NamedTuple):
    """Results per split: output sums [Hq, D], score maxima and weight sums [Hq]."""

    sums: Any
    tops: Any
    totals: Any


class Scratch(NamedTuple):
    """What one thread writes to."""

    queries: Any  # whole, then gathered, [2, G, D]
    scores: Any  # [G, split_columns]
    runs: Any  # offsets of the split's blocks
    tokens: Any  # and the tokens in them
    kept: Any  # sums over kept value channels [G, V in whole lanes]
    folded: Any  # for add_matrix


@kernel(parallel=True)
def attend(threads, inputs, scale, cap, out, cache, shape, keys, values, sizes):
    """Attend with every row and write ``out``. The blocks are those of ``blocks.Blocks``."""
    seq_len = inputs.seq_len
    first_split, row_of_split = plan_splits(seq_len, inputs.thin_spans, shape, sizes)
    num_splits, num_heads = len(row_of_split), shape.kv_heads * sizes.group
    partials = Partials(
        np.empty(num_splits * num_heads * shape.head_size, np.float32),
        np.empty(num_splits * num_heads, np.float32),
        np.empty(num_splits * num_heads, np.float32),
    )
    # Items drawn, then per (row, KV head) the splits that are done.
    counters = np.zeros(1 + len(seq_len) * shape.kv_heads, np.int64)
    for row in range(len(seq_len)):
        if seq_len[row] == 0:
            start = row * sizes.out_stride
            out[start : start + num_heads * shape.head_size] = 0
    for _ in prange(threads):
        _work(
            inputs, scale, cap, out, cache, shape, keys, values, sizes,
            first_split, row_of_split, partials, counters,
        )  # fmt: skip


@njit
def _work(
    inputs, scale, cap, out, cache, shape, keys, values, sizes, first_split, row_of_split, partials,
    counters,
):  # fmt: skip
    """Draw items until there are none left. One thread runs this."""
    split_blocks = max(sizes.thin_split_blocks, sizes.dense_split_blocks)
    longest = whole_lanes(max(shape.head_size, shape.thin_tokens))
    scratch = Scratch(
        np.zeros(2 * sizes.group * shape.head_size, np.float32),
        np.empty(sizes.group * sizes.split_columns, np.float32),
        np.empty(split_blocks, np.int64),
        np.empty(split_blocks, np.int64),
        np.empty(sizes.group * whole_lanes(shape.value_channels), np.float32),
        np.empty((sizes.group + 2) * longest, np.float32),
    )
    num_items = len(row_of_split) * shape.kv_heads
    item = fetch_add(counters, 0)
    while item < num_items:
        split, kv_head = item // shape.kv_heads, item % shape.kv_heads
        row = row_of_split[split]
        first, end = first_split[row], first_split[row + 1]
        head = (split * shape.kv_heads + kv_head) * sizes.group
        start = head * shape.head_size
        partials.sums[start : start + sizes.group * shape.head_size] = np.float32(0.0)
        scratch.scores[:] = np.float32(0.0)
        _load_queries(inputs.query, row, kv_head, scale, scratch.queries, shape, sizes)
        begin, count, thin = find_blocks(
            inputs, row, split - first, kv_head, scratch.runs, scratch.tokens, shape, sizes
        )
        if thin:
            _score_thin(cache, keys, begin, count, scratch, shape, sizes)
            _apply_soft_cap(count, cap, head, scratch, partials, sizes)
            if shape.value_channels_offset >= 0:
                sum_kept_values(cache, values, begin, count, start, scratch, partials, shape, sizes)
            else:
                sum_thin_values(cache, values, count, start, scratch, partials, shape, sizes)
        else:
            _score_dense(cache, count, scratch, shape, sizes)
            _apply_soft_cap(count, cap, head, scratch, partials, sizes)
            sum_dense_values(cache, count, start, scratch, partials, shape, sizes)
        if fetch_add(counters, 1 + row * shape.kv_heads + kv_head) == end - first - 1:
            _combine(first, end, row, kv_head, inputs.sinks, partials, out, shape, sizes)
        item = fetch_add(counters, 0)


@njit
def _load_queries(query, row, kv_head, scale, queries, shape, sizes):
    """Scale the group's queries, in float32, into the first half of ``queries``."""
    width = sizes.group * shape.head_size
    start = row * sizes.query_stride + kv_head * width
    # Slices, because an index that might be negative would keep LLVM from vectorizing.
    elements = query[start : start + width]
    for x in range(width):
        queries[x] = element_to_float32(elements[x]) * scale


@njit
def _gather_queries(bytes, run, queries, shape, sizes):
    """Gather the queries through a thin block's table into the second half of ``queries``."""
    start = run * shape.itemsize + shape.channels_offset
    table = bytes[start : start + shape.key_channels]
    for head in range(sizes.group):
        whole = queries[head * shape.head_size : (head + 1) * shape.head_size]
        gathered = queries[(sizes.group + head) * shape.head_size :]
        for i in range(len(table)):
            gathered[i] = whole[table[i]]


@njit
def _score_thin(cache, keys, begin, count, scratch, shape, sizes):
    """Scores [G, columns] of thin blocks; every block starts at a multiple of LANES columns."""
    pruned = shape.channels_offset >= 0
    queries = sizes.group * shape.head_size if pruned else 0
    x = 0
    for i in range(count):
        # The blocks of a span share one table, and a split may start inside a span.
        if pruned and (i == 0 or (begin + i) % shape.thin_blocks == 0):
            _gather_queries(cache.bytes, scratch.runs[i], scratch.queries, shape, sizes)
        columns = whole_lanes(scratch.tokens[i])
        add_matrix(
            scratch.scores, x, sizes.split_columns, scratch.queries, queries, shape.head_size,
            cache, scratch.runs[i], scratch.runs[min(i + 1, count - 1)], keys,
            shape.itemsize, shape.key_channels, sizes.group, columns, scratch.folded,
        )  # fmt: skip
        x += columns


@njit
def _score_dense(cache, count, scratch, shape, sizes):
    """Scores [G, columns] of dense blocks."""
    x = 0
    for i in range(count):
        # The last block's successor are the first one's values.
        values = scratch.runs[0] + shape.head_size * shape.block_size
        following = scratch.runs[i + 1] if i + 1 < count else values
        columns = whole_lanes(scratch.tokens[i])
        add_products(
            scratch.scores, x, sizes.split_columns, scratch.queries, 0, shape.head_size,
            cache.elements, scratch.runs[i], shape.block_size, shape.head_size, sizes.group,
            columns, following - scratch.runs[i],
        )  # fmt: skip
        x += columns


@njit
def _apply_soft_cap(count, cap, first_head, scratch, partials, sizes):
    """Scores -> weights that have yet to be divided by their sum."""
    for head in range(sizes.group):
        start = head * sizes.split_columns
        columns = 0
        for i in range(count):
            tokens = scratch.tokens[i]
            if cap > 0:
                cap_row(scratch.scores[start + columns : start + columns + tokens], cap)
            for padding in range(start + columns + tokens, start + columns + whole_lanes(tokens)):
                scratch.scores[padding] = LOWEST
            columns += whole_lanes(tokens)
        row = scratch.scores[start : start + columns]
        top = row_max(row)
        partials.tops[first_head + head] = top
        partials.totals[first_head + head] = exp_row(row, top)


@njit
def _combine(first, end, row, kv_head, sinks, partials, out, shape, sizes):
    """Weigh a row's splits ``first .. end - 1`` against each other and write its output.

    A sink is a score with weight but no value: it counts in the total alone.
    """
    num_heads, head_size = shape.kv_heads * sizes.group, shape.head_size
    result = np.empty(head_size, np.float32)
    for head in range(kv_head * sizes.group, (kv_head + 1) * sizes.group):
        top = partials.tops[first * num_heads + head]
        for split in range(first + 1, end):
            other = partials.tops[split * num_heads + head]
            top = other if other > top else top
        result[:] = np.float32(0.0)
        total = np.float32(0.0)
        if len(sinks) > 0:
            sink = sinks[head]
            top = sink if sink > top else top
            total += exp(sink - top)
        for split in range(first, end):
            weight = exp(partials.tops[split * num_heads + head] - top)
            total += weight * partials.totals[split * num_heads + head]
            start = (split * num_heads + head) * head_size
            sums = partials.sums[start : start + head_size]
            for d in range(head_size):
                result[d] += weight * sums[d]
        start = row * sizes.out_stride + head * head_size
        elements = out[start : start + head_size]
        for d in range(head_size):
            elements[d] = float32_to_element(result[d] / total, elements[d])
