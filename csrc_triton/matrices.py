"""Reading matrices of elements, or of e4m3 codes that lie as elements do, as float32 tiles.

Pointers are cast to elements before offsets are added, and no mask varies along a row but at
multiples of 16: otherwise Triton does not see that neighbours are neighbours, and loads them one
by one.
"""

import triton
import triton.language as tl


@triton.jit
def as_elements(byte_ptr, dtype: tl.constexpr):
    """Byte pointers -> pointers to ``dtype``."""
    return byte_ptr.to(tl.pointer_type(dtype), bitcast=True)


@triton.jit
def decode_fp8(codes):
    """e4m3 codes -> float32. Bits, not a cast: GPUs before compute capability 8.9 have none."""
    wide = codes.to(tl.int32)
    # A float16 whose exponent bias is 8 higher; its sign sits 8 bits further up.
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def load_codes(
    start, rows, row_mask, first,
    COLUMNS: tl.constexpr, HELD: tl.constexpr, ROW: tl.constexpr, BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Load rows of a matrix as float32: elements or e4m3 values.

    Reads whole tiles: columns behind the last one hold whatever follows in the run. Rows at the
    run's end have too little behind them, so columns from ``HELD`` on are left out if that is less
    than ``COLUMNS``.

    Args:
        start: Byte pointer to the matrix.
        rows: Row numbers ``[R]``.
        row_mask: ``[R]``: which rows to read; the others are 0.
        first: First column.
        COLUMNS: Of the tile.
        HELD: Columns of the tile that may be read.
        ROW: Bytes of a row.
        BITS: 8 for e4m3 codes, 0 for elements.
        DTYPE: Of elements.
    """
    index = tl.arange(0, COLUMNS)
    mask = row_mask[:, None]
    if HELD < COLUMNS:
        mask = mask & (index < HELD)[None, :]
    if BITS == 0:
        SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
        at = as_elements(start, DTYPE) + rows[:, None] * (ROW // SIZE) + (first + index)[None, :]
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    else:
        at = start + rows[:, None] * ROW + (first + index)[None, :]
        return decode_fp8(tl.load(at, mask=mask, other=0))
