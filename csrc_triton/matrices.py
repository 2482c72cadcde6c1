"""Reading coded matrices: tiles of codes as float32, and the scales and zeros beside them.

Integer codes are ``8 // bits`` to a byte, first code lowest. A tile takes its columns in **byte
order**: first the lowest code of every byte, then the next one, so that threads read neighbouring
bytes and no code has to change places. ``column_of`` says what is where.

Pointers are cast to elements before offsets are added, and no mask varies along a row but at
multiples of 16: otherwise Triton does not see that neighbours are neighbours, and loads them one
by one.
"""

import triton
import triton.language as tl


@triton.jit
def parts_of(BITS: tl.constexpr):
    """Codes of a byte; 1 for elements and for fp8."""
    return 8 // BITS if (BITS == 2 or BITS == 4) else 1


@triton.jit
def column_of(index, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Column of a matrix that a tile of ``COLUMNS`` columns has at ``index``."""
    WIDTH: tl.constexpr = COLUMNS // PARTS
    return index % WIDTH * PARTS + index // WIDTH


@triton.jit
def in_order(tile, PARTS: tl.constexpr):
    """Columns ``[R, X]`` in byte order -> in order."""
    ROWS: tl.constexpr = tile.shape[0]
    COLUMNS: tl.constexpr = tile.shape[1]
    apart = tl.reshape(tile, [ROWS, PARTS, COLUMNS // PARTS])
    return tl.reshape(tl.permute(apart, (0, 2, 1)), [ROWS, COLUMNS])


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
    """Load rows of a matrix as float32: elements, e4m3 values or integer codes, in byte order.

    Reads whole tiles: columns behind the last one hold whatever follows in the run. Rows at the
    run's end have too little behind them, so columns from ``HELD`` on are left out if that is less
    than ``COLUMNS``; integer codes are followed by their scales, and need none of this.

    Args:
        start: Byte pointer to the matrix.
        rows: Row numbers ``[R]``.
        row_mask: ``[R]``: which rows to read; the others are 0.
        first: First column, a multiple of the codes of a byte.
        COLUMNS: Of the tile.
        HELD: Columns of the tile that may be read.
        ROW: Bytes of a row.
        BITS: Of a code, 0 for elements.
        DTYPE: Of elements.
    """
    index = tl.arange(0, COLUMNS)
    mask = row_mask[:, None]
    if HELD < COLUMNS and (BITS == 0 or BITS == 8):
        mask = mask & (index < HELD)[None, :]
    if BITS == 0:
        SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
        at = as_elements(start, DTYPE) + rows[:, None] * (ROW // SIZE) + (first + index)[None, :]
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)
    elif BITS == 8:
        at = start + rows[:, None] * ROW + (first + index)[None, :]
        return decode_fp8(tl.load(at, mask=mask, other=0))
    else:
        PARTS: tl.constexpr = 8 // BITS
        WIDTH: tl.constexpr = COLUMNS // PARTS
        at = start + rows[:, None] * ROW + (first // PARTS + index % WIDTH)[None, :]
        codes = tl.load(at, mask=mask, other=0).to(tl.int32)
        return ((codes >> (index // WIDTH * BITS)[None, :]) & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def load_halves(start, index, mask):
    """Float16 scales or zeros from a byte pointer on, as float32."""
    return tl.load(as_elements(start, tl.float16) + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_scale(start):
    """The float32 scale of an fp8 matrix."""
    return tl.load(as_elements(start, tl.float32))


@triton.jit
def spread(groups, COLUMNS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """Numbers per group of a row ``[R, G]`` -> per column ``[R, COLUMNS]``, in byte order."""
    ROWS: tl.constexpr = groups.shape[0]
    WIDTH: tl.constexpr = GROUP // PARTS
    wide = groups[:, None, :, None]
    wide = tl.broadcast_to(wide, [ROWS, PARTS, COLUMNS // GROUP, WIDTH])
    return tl.reshape(wide, [ROWS, COLUMNS])


@triton.jit
def load_values(
    run, tokens, token_mask,
    V: tl.constexpr, V_PAD: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, OFFSET: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr,
    ZEROS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Values of a thin block as float32 ``[tokens, V_PAD]``, kept channels in byte order.

    e4m3 values come without their scale. Columns behind V are rubbish for integer codes, else 0.
    """
    PARTS: tl.constexpr = parts_of(BITS)
    values = load_codes(run + OFFSET, tokens, token_mask, 0, V_PAD, V, ROW, BITS, DTYPE)
    if PARTS > 1:
        groups = tl.arange(0, V_PAD // GROUP)
        index = groups[None, :] * T + tokens[:, None]
        mask = token_mask[:, None] & (groups * GROUP < V)[None, :]
        scales = load_halves(run + SCALES, index, mask)
        zeros = load_halves(run + ZEROS, index, mask)
        values = values * spread(scales, V_PAD, PARTS, GROUP) + spread(zeros, V_PAD, PARTS, GROUP)
    return values


@triton.jit
def scatter_channels(
    kept, table, V: tl.constexpr, D_PAD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Columns of kept channels ``[R, V_PAD]``, in byte order -> all channels ``[R, D_PAD]``.

    Those are in order, and 0 where a channel was pruned.

    Args:
        kept: What is known of each kept channel.
        table: Byte pointer to the kept channels, ascending.
        V: Kept channels.
        D_PAD: Channels, rounded up.
        BITS: Of the codes whose order ``kept`` has.
    """
    ROWS: tl.constexpr = kept.shape[0]
    V_PAD: tl.constexpr = kept.shape[1]
    PARTS: tl.constexpr = parts_of(BITS)
    index = tl.arange(0, V_PAD)
    channel = tl.load(table + index, mask=index < V, other=0).to(tl.int32)
    held = tl.histogram(channel, D_PAD, mask=index < V)
    column = tl.maximum(tl.cumsum(held, axis=0) - 1, 0)
    # The inverse of ``column_of``.
    place = column // PARTS + column % PARTS * (V_PAD // PARTS)
    found = tl.gather(kept, tl.broadcast_to(place[None, :], [ROWS, D_PAD]), axis=1)
    return tl.where((held > 0)[None, :], found, 0.0)


@triton.jit
def output_parts(VALUE_BITS: tl.constexpr, VALUE_TABLE: tl.constexpr):
    """``parts_of`` the order that sums over values have: of their codes, unless scattered."""
    return 1 if VALUE_TABLE >= 0 else parts_of(VALUE_BITS)
