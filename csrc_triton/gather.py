"""Gather tiles of dense blocks, and code them as the matrices of a thin block."""

import triton
import triton.language as tl

from csrc_triton.blocks import dense_rows, find_run
from csrc_triton.quantization import (
    MAGNITUDE,
    as_float,
    element_pointer,
    fp8_inverse,
    fp8_zeros,
    load_bits,
    put_tile,
    store_bits,
)

#: Rows and columns of a tile; integer codes take one group as columns.
TILE_ROWS, TILE_COLUMNS = tl.constexpr(32), tl.constexpr(64)
#: Elements of a tile that has whole rows, to choose zeros; 8 for each thread.
WHOLE_ROWS = tl.constexpr(2048)


@triton.jit
def code_matrix(
    run, base, aside, entries, table, k, head, block_stride, head_stride, rows, columns,
    KEYS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Gather the keys ``[C, tokens]`` or values ``[tokens, V]`` of a thin block, and write them.

    Args:
        run: Byte pointer to the run of the thin block.
        base: Byte pointer to the cache.
        aside: Byte pointer to what ``run`` held.
        entries: Pointer to the span's block numbers.
        table: Pointer to the kept channels, of keys or of values, if some were pruned.
        k: Which of the span's thin blocks it is.
        head: KV head.
        block_stride: Bytes between blocks.
        head_stride: Bytes between the KV heads of a block.
        rows: Rows that hold something.
        columns: Columns that hold something.
        KEYS: Keys or values.
        L: The ``Layout``.
    """
    M: tl.constexpr = L.KEYS if KEYS else L.VALUES
    ROWS: tl.constexpr = TILE_ROWS
    COLUMNS: tl.constexpr = M.GROUP if (M.BITS == 2 or M.BITS == 4) else TILE_COLUMNS
    inverse, zero = 0.0, tl.zeros((ROWS, 1), tl.float32)
    if M.BITS == 8 and KEYS:
        largest = put_zeros(
            run, base, aside, entries, table, k, head, block_stride, head_stride, rows, columns,
            triton.next_power_of_2(L.T), M, L,
        )  # fmt: skip
        scale, inverse = fp8_inverse(largest)
        tl.store(element_pointer(run + M.SCALES, 4), scale)
        # Other threads have written the zeros that these read.
        tl.debug_barrier()
    elif M.BITS == 8:
        top = tl.zeros((ROWS, COLUMNS), tl.int32)
        for row in range(0, rows, ROWS):
            for column in range(0, columns, COLUMNS):
                bits = load_tile(
                    base, aside, entries, table, k, head, block_stride, head_stride, row, column,
                    rows, columns, KEYS, ROWS, COLUMNS, M, L,
                )  # fmt: skip
                bits = as_float(bits, L.DTYPE).to(tl.int32, bitcast=True)
                top = tl.maximum(top, bits & MAGNITUDE)
        scale, inverse = fp8_inverse(tl.max(tl.max(top, axis=1), axis=0))
        tl.store(element_pointer(run + M.SCALES, 4), scale)
    for row in range(0, rows, ROWS):
        for column in range(0, columns, COLUMNS):
            bits = load_tile(
                base, aside, entries, table, k, head, block_stride, head_stride, row, column,
                rows, columns, KEYS, ROWS, COLUMNS, M, L,
            )  # fmt: skip
            tile_rows, tile_columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
            if M.BITS == 8 and KEYS:
                zero = load_bits(element_pointer(run + M.ZEROS, 2) + tile_rows, tile_rows < rows)
                zero = as_float(zero, tl.float16)[:, None]
            put_tile(
                run, bits, tile_rows, tile_columns, tile_rows < rows, tile_columns < columns,
                zero, inverse, M, L.DTYPE,
            )  # fmt: skip


@triton.jit
def put_zeros(
    run, base, aside, entries, table, k, head, block_stride, head_stride, rows, columns,
    COLUMNS: tl.constexpr, M: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Write the zeros of fp8 keys; bits of the largest magnitude without them. See above."""
    ROWS: tl.constexpr = WHOLE_ROWS // COLUMNS
    largest = tl.zeros((), tl.int32)
    for row in range(0, rows, ROWS):
        bits = load_tile(
            base, aside, entries, table, k, head, block_stride, head_stride, row, 0,
            rows, columns, True, ROWS, COLUMNS, M, L,
        )  # fmt: skip
        tile_rows, held = row + tl.arange(0, ROWS), (tl.arange(0, COLUMNS) < columns)[None, :]
        values = as_float(bits, L.DTYPE)
        zeros = fp8_zeros(values, tl.broadcast_to(held, [ROWS, COLUMNS]), columns)
        store_bits(element_pointer(run + M.ZEROS, 2) + tile_rows, zeros, tile_rows < rows)
        left = (values - as_float(zeros, tl.float16)[:, None]).to(tl.int32, bitcast=True)
        left = tl.where(held, left & MAGNITUDE, 0)
        largest = tl.maximum(largest, tl.max(tl.max(left, axis=1), axis=0))
    return largest


@triton.jit
def load_tile(
    base, aside, entries, table, k, head, block_stride, head_stride, row, column, rows, columns,
    KEYS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """Elements of a tile from dense blocks ``[ROWS, COLUMNS]``, 0 outside the matrix."""
    SIZE: tl.constexpr = L.DTYPE.primitive_bitwidth // 8
    tile_rows, tile_columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    row_mask, column_mask = tile_rows < rows, tile_columns < columns
    if KEYS:
        place, held = tile_columns, column_mask
    else:
        place, held = tile_rows, row_mask
    token = k * L.T + place
    entry, place = token // L.N, token % L.N
    block = tl.load(entries + entry, mask=held, other=0)
    runs = find_run(base, block, head, block_stride, head_stride)
    runs = tl.where(entry == k, aside, runs)
    # Neighbouring threads read channels of one token, kept or not: a block has tokens in rows.
    rows = dense_rows(element_pointer(runs, SIZE), place, L.D)[:, None]
    if KEYS:
        channel = tile_rows
        if M.TABLE >= 0:
            channel = tl.load(table + tile_rows, mask=row_mask, other=0).to(tl.int32)
        bits = load_bits(rows + channel[None, :], column_mask[:, None] & row_mask[None, :])
        return tl.trans(bits)
    else:
        channel = tile_columns
        if M.TABLE >= 0:
            channel = tl.load(table + tile_columns, mask=column_mask, other=0).to(tl.int32)
        return load_bits(rows + L.D + channel[None, :], row_mask[:, None] & column_mask[None, :])
