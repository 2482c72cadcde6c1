"""Products with quantized matrices. Nothing is dequantized: factors hold scales and zeros.

With ``element = zero[g, r] + code * scale[g, r]`` and the centred ``m = (code - middle) / unit``
that the loaders of ``vectors.py`` give, ``unit = 2 ** bits`` and ``middle = (unit - 1) / 2``,

    sum_r f[r] * element[r, x] = sum_r (f[r] * step[r]) * m[r, x] + sum_r f[r] * base[r]
    step = scale * unit,  base = zero + scale * middle

for all columns ``x`` of a group. The first factor takes a multiplication per row and group, and the
last sum is one number per group.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from numba.extending import overload

from think_vllm.kernels.cpu.blocks import (
    Fp8Columns,
    Fp8Keys,
    Fp8Matrix,
    Fp8Rows,
    Int2Matrix,
    Int4Matrix,
    PlainMatrix,
)
from think_vllm.kernels.cpu.compiling import named
from think_vllm.kernels.cpu.folding import add_constant, fold, load_steps
from think_vllm.kernels.cpu.splits import whole_lanes
from think_vllm.kernels.cpu.tiles import add_fp8, add_int2, add_int4, add_products

FP8_UNIT = np.float32(256.0)
ZERO = np.float32(0.0)


def add_matrix(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following, matrix,
    itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    """Add ``sums[h, x] += sum_r factors[h, r] * matrix[r, x]``, in compiled code only.

    ``Fp8Columns`` want sums that are zero before.

    Args:
        sums: Flat float32; holds ``[heads, columns]``.
        sums_at: Offset of its first element.
        sums_stride: Elements between its rows.
        factors: Flat float32; holds ``[heads, num_rows]``, and finite numbers behind each row up
            to a multiple of LANES.
        factors_at: Offset of its first element.
        factors_stride: Elements between its rows.
        cache: The ``Cache``.
        run: Offset of the matrix's run, in elements.
        following: Offset of the run that is read next, for prefetching.
        matrix: Where in the run, and how quantized.
        itemsize: Bytes of an element.
        num_rows: At least 1.
        heads: Query heads of the group.
        columns: A multiple of ``LANES``; those behind the last written one get finite rubbish.
        scratch: Flat float32 for ``heads + 2`` times ``num_rows``, rounded up to LANES.
    """
    raise NotImplementedError


def _add_plain(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    add_products(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride,
        cache.elements, run + matrix.offset, matrix.row_stride, num_rows, heads, columns,
        following - run,
    )  # fmt: skip


@njit
def _add_with_unit(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch, unit,
):  # fmt: skip
    """Add fp8 codes that count ``unit`` times what ``add_fp8`` takes them for."""
    for head in range(heads):
        first = factors_at + head * factors_stride
        given = factors[first : first + num_rows]
        folded = scratch[head * num_rows : (head + 1) * num_rows]
        for r in range(num_rows):
            folded[r] = given[r] * unit
    start = run * itemsize + matrix.offset
    add_fp8(
        sums, sums_at, sums_stride, scratch, 0, num_rows,
        cache.bytes, start, matrix.row_stride, num_rows, heads, columns,
        (following - run) * itemsize,
    )  # fmt: skip


def _add_fp8(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    _add_with_unit(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
        matrix, itemsize, num_rows, heads, columns, scratch,
        FP8_UNIT * cache.floats[run * itemsize // 4 + matrix.scale],
    )  # fmt: skip


def _add_fp8_keys(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    start = run * itemsize
    padded = whole_lanes(num_rows)
    steps = scratch[heads * padded : (heads + 1) * padded]
    bases = scratch[(heads + 1) * padded : (heads + 2) * padded]
    zeros = start // 2 + matrix.zeros
    load_steps(cache.halves, zeros, zeros, num_rows, ZERO, ZERO, steps, bases)
    steps[:] = FP8_UNIT * cache.floats[start // 4 + matrix.scale]
    for head in range(heads):
        constant = fold(
            factors, factors_at + head * factors_stride, steps, bases, num_rows,
            scratch, head * padded,
        )  # fmt: skip
        add_constant(sums, sums_at + head * sums_stride, columns, constant)
    add_fp8(
        sums, sums_at, sums_stride, scratch, 0, padded,
        cache.bytes, start + matrix.offset, matrix.row_stride, num_rows, heads, columns,
        (following - run) * itemsize,
    )  # fmt: skip


def _add_fp8_columns(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    _add_with_unit(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
        matrix, itemsize, num_rows, heads, columns, scratch, FP8_UNIT,
    )  # fmt: skip
    # Scores have nothing in them before their block is added, so whole sums can be scaled.
    first = run * itemsize // 4 + matrix.scales
    scales = cache.floats[first : first + columns]
    for head in range(heads):
        scores = sums[sums_at + head * sums_stride : sums_at + head * sums_stride + columns]
        for x in range(columns):
            scores[x] *= scales[x]


def _add_fp8_rows(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
    matrix, itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    start = run * itemsize
    first = start // 4 + matrix.scales
    scales = cache.floats[first : first + num_rows]
    for head in range(heads):
        first = factors_at + head * factors_stride
        given = factors[first : first + num_rows]
        folded = scratch[head * num_rows : (head + 1) * num_rows]
        for r in range(num_rows):
            folded[r] = given[r] * (FP8_UNIT * scales[r])
    add_fp8(
        sums, sums_at, sums_stride, scratch, 0, num_rows,
        cache.bytes, start + matrix.offset, matrix.row_stride, num_rows, heads, columns,
        (following - run) * itemsize,
    )  # fmt: skip


def _make_add_integers(bits: int, add_codes: Callable[..., None]) -> Any:
    unit = np.float32(1 << bits)
    middle = np.float32(((1 << bits) - 1) / 2)

    @named(bits)
    def add_integers(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following,
        matrix, itemsize, num_rows, heads, columns, scratch,
    ):  # fmt: skip
        start = run * itemsize
        codes = start + matrix.offset
        padded = whole_lanes(num_rows)
        steps = scratch[heads * padded : (heads + 1) * padded]
        bases = scratch[(heads + 1) * padded : (heads + 2) * padded]
        for x in range(0, columns, matrix.group):
            width = min(matrix.group, columns - x)
            first = start // 2 + x // matrix.group * matrix.rows
            load_steps(
                cache.halves, first + matrix.scales, first + matrix.zeros, num_rows,
                unit, middle, steps, bases,
            )  # fmt: skip
            for head in range(heads):
                constant = fold(
                    factors, factors_at + head * factors_stride, steps, bases, num_rows,
                    scratch, head * padded,
                )  # fmt: skip
                add_constant(sums, sums_at + head * sums_stride + x, width, constant)
            add_codes(
                sums, sums_at + x, sums_stride, scratch, 0, padded,
                cache.bytes, codes + x * bits // 8, matrix.row_stride, num_rows, heads, width,
                (following - run) * itemsize,
            )  # fmt: skip

    return add_integers


_ADDERS = {
    PlainMatrix: _add_plain,
    Fp8Matrix: _add_fp8,
    Fp8Keys: _add_fp8_keys,
    Fp8Columns: _add_fp8_columns,
    Fp8Rows: _add_fp8_rows,
    Int4Matrix: _make_add_integers(4, add_int4),
    Int2Matrix: _make_add_integers(2, add_int2),
}


@overload(add_matrix)
def _choose_adder(
    sums, sums_at, sums_stride, factors, factors_at, factors_stride, cache, run, following, matrix,
    itemsize, num_rows, heads, columns, scratch,
):  # fmt: skip
    return _ADDERS[matrix.instance_class]
