"""How the context of a row is cut, and where its blocks are."""

from typing import Any, NamedTuple

import numpy as np
from numba import njit

from think_vllm.kernels.cpu.vectors import LANES


class Inputs(NamedTuple):
    """The arrays that are read."""

    query: Any
    block_table: Any
    request: Any
    seq_len: Any
    thin_spans: Any
    sinks: Any  # float32 [Hq], or [0]


class Sizes(NamedTuple):
    """Sizes and strides beside those of the blocks, int64, in elements."""

    group: int
    query_stride: int
    out_stride: int
    thin_split_blocks: int
    dense_split_blocks: int
    split_columns: int


@njit
def plan_splits(seq_len, thin_spans, shape, sizes):
    """First split of every row, and behind the last one the end; the row of every split."""
    num_rows = len(seq_len)
    first_split = np.zeros(num_rows + 1, np.int64)
    for row in range(num_rows):
        thin, dense = count_blocks(seq_len[row], thin_spans[row], shape)
        splits = ceil_div(thin, sizes.thin_split_blocks) + ceil_div(dense, sizes.dense_split_blocks)
        first_split[row + 1] = first_split[row] + splits
    row_of_split = np.empty(first_split[num_rows], np.int64)
    for row in range(num_rows):
        row_of_split[first_split[row] : first_split[row + 1]] = row
    return first_split, row_of_split


@njit
def ceil_div(count, size):
    """Parts of at most ``size`` that ``count`` needs."""
    return (count + size - 1) // size


@njit
def count_blocks(seq_len, thin_spans, shape):
    """Thin and dense blocks that hold a context."""
    dense = seq_len - thin_spans * shape.span_blocks * shape.block_size
    return thin_spans * shape.thin_blocks, ceil_div(dense, shape.block_size)


@njit
def whole_lanes(tokens):
    """Columns that are read for ``tokens`` tokens."""
    return (tokens + LANES - 1) // LANES * LANES


@njit
def find_blocks(inputs, row, split, kv_head, runs, tokens, shape, sizes):
    """Write where the runs of a row's ``split``-th split are, and their tokens.

    Returns:
        The split's first block among those of its kind, how many there are, whether it is thin.
    """
    seq_len, thin_spans = np.int64(inputs.seq_len[row]), np.int64(inputs.thin_spans[row])
    num_thin, num_dense = count_blocks(seq_len, thin_spans, shape)
    thin_splits = ceil_div(num_thin, sizes.thin_split_blocks)
    table_row = np.int64(inputs.request[row]) * shape.table_stride
    thin = split < thin_splits
    if thin:
        begin = split * sizes.thin_split_blocks
        count = min(sizes.thin_split_blocks, num_thin - begin)
    else:
        begin = (split - thin_splits) * sizes.dense_split_blocks
        count = min(sizes.dense_split_blocks, num_dense - begin)
    for i in range(count):
        block = begin + i
        if thin:
            span, k = block // shape.thin_blocks, block % shape.thin_blocks
            left = shape.span_blocks * shape.block_size - k * shape.thin_tokens
            entry = span * shape.span_blocks + k
            # A static block (static.py) may be the last one of a context, and not full.
            first = span * shape.span_blocks * shape.block_size + k * shape.thin_tokens
            tokens[i] = min(left, shape.thin_tokens, seq_len - first)
        else:
            entry = thin_spans * shape.span_blocks + block
            tokens[i] = min(seq_len - entry * shape.block_size, shape.block_size)
        page = np.int64(inputs.block_table[table_row + entry])
        runs[i] = page * shape.block_stride + kv_head * shape.run_stride
    return begin, count, thin
