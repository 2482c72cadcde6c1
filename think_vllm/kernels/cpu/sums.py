"""The second half of attention: weighted sums of a split's values, for the heads of a group."""

import numpy as np
from numba import njit

from think_vllm.kernels.cpu.products import add_matrix
from think_vllm.kernels.cpu.splits import whole_lanes
from think_vllm.kernels.cpu.tiles import add_products


@njit
def sum_thin_values(cache, values, count, start, scratch, partials, shape, sizes):
    """Weighted sums [G, D] of thin blocks' values."""
    x = 0
    for i in range(count):
        add_matrix(
            partials.sums, start, shape.head_size, scratch.scores, x, sizes.split_columns,
            cache, scratch.runs[i], scratch.runs[min(i + 1, count - 1)], values,
            shape.itemsize, scratch.tokens[i], sizes.group, shape.head_size, scratch.folded,
        )  # fmt: skip
        x += whole_lanes(scratch.tokens[i])


@njit
def sum_kept_values(cache, values, begin, count, start, scratch, partials, shape, sizes):
    """Weighted sums [G, D] of thin blocks' values, some channels of which were pruned."""
    width = whole_lanes(shape.value_channels)
    x = 0
    for i in range(count):
        # As for keys, the blocks of a span share one table.
        if i == 0 or (begin + i) % shape.thin_blocks == 0:
            scratch.kept[:] = np.float32(0.0)
        add_matrix(
            scratch.kept, 0, width, scratch.scores, x, sizes.split_columns,
            cache, scratch.runs[i], scratch.runs[min(i + 1, count - 1)], values,
            shape.itemsize, scratch.tokens[i], sizes.group, width, scratch.folded,
        )  # fmt: skip
        if i == count - 1 or (begin + i + 1) % shape.thin_blocks == 0:
            _scatter_sums(cache.bytes, scratch.runs[i], start, scratch, partials, shape, sizes)
        x += whole_lanes(scratch.tokens[i])


@njit
def _scatter_sums(bytes, run, start, scratch, partials, shape, sizes):
    """Add the sums over kept channels where a thin block's table says."""
    first = run * shape.itemsize + shape.value_channels_offset
    table = bytes[first : first + shape.value_channels]
    width = whole_lanes(shape.value_channels)
    for head in range(sizes.group):
        kept = scratch.kept[head * width :]
        sums = partials.sums[start + head * shape.head_size :]
        for i in range(len(table)):
            sums[table[i]] += kept[i]


@njit
def sum_dense_values(cache, count, start, scratch, partials, shape, sizes):
    """Weighted sums [G, D] of dense blocks' values."""
    x = 0
    for i in range(count):
        values = scratch.runs[i] + shape.head_size * shape.block_size
        add_products(
            partials.sums, start, shape.head_size, scratch.scores, x, sizes.split_columns,
            cache.elements, values, shape.head_size, scratch.tokens[i], sizes.group,
            shape.head_size, scratch.runs[min(i + 1, count - 1)] - scratch.runs[i],
        )  # fmt: skip
        x += whole_lanes(scratch.tokens[i])
