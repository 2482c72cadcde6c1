"""Quantized matrices as kernels read them: units of codes -> operands of tensor cores.

A unit (``plan/matrix_layout.py``) holds ``32 / bits`` columns of two rows, so a thread that loads
units holds, for some columns, neighbouring rows: just what a register of an ``mma`` operand holds
along the dimension that is summed over. That dimension is the channels of keys and the tokens of
values, which are the rows of their matrices. So codes become pairs of float16 numbers by bit
operations and one fused multiply-add per pair, and nothing passes through shared memory.

For that, loads must give threads what ``mma`` expects of them: four threads share the rows of a
tile and eight its columns, hence the shapes below. Triton derives layouts from shapes; if it chose
others, results would be the same, at the price of shuffles, which ``bench/instructions.py`` counts.

Source of the bit operations: Kim et al., arXiv 2211.10017 (FasterTransformer), and Marlin, arXiv
2408.11743: an integer in the low bits of a float16's mantissa, behind a fixed exponent, is a number
with a constant offset, and the offset goes into the zero.
"""

import triton
import triton.language as tl

from csrc_triton.blocks import find_pages

#: Columns of a tile's units that lie in different threads, and threads that share its rows.
LANES = tl.constexpr(8)

#: Offsets of numbers that hold integers, negative, as two float16 numbers.
LESS_4 = tl.constexpr(0xC400C400 - 2**32)
LESS_16 = tl.constexpr(0xCC00CC00 - 2**32)

#: Two zeros as they are needed: ``zero - offset * scale``. $1 scales, $2 zeros, $3 -offset, twice.
_OFFSET = tl.constexpr("fma.rn.f16x2 $0, $1, $3, $2;")

#: A word of 4-bit codes ($8) -> 4 columns of both rows. $9 scales, $10 zeros less 16 scales.
#: Code bits go to bits 6 .. 9 of float16 numbers from 16 on (0x4C00), whose unit is bit 6.
_INT4 = tl.constexpr("""
{ .reg .b32 a, b, c, d;
shl.b32 a, $8, 6; shl.b32 b, $8, 2; shr.u32 c, $8, 2; shr.u32 d, $8, 6;
lop3.b32 a, a, 0x03c003c0, 0x4c004c00, 0xea;
lop3.b32 b, b, 0x03c003c0, 0x4c004c00, 0xea;
lop3.b32 c, c, 0x03c003c0, 0x4c004c00, 0xea;
lop3.b32 d, d, 0x03c003c0, 0x4c004c00, 0xea;
fma.rn.f16x2 a, a, $9, $10; fma.rn.f16x2 b, b, $9, $10;
fma.rn.f16x2 c, c, $9, $10; fma.rn.f16x2 d, d, $9, $10;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d; }""")

#: A word of 2-bit codes ($16) -> 8 columns of both rows. $17 scales, $18 zeros less 4 scales.
#: Code bits go to bits 8 and 9 of float16 numbers from 4 on (0x4400). Offsets of 16 would save
#: shifts, and let a zero less 16 scales leave float16's range where numbers are above 5,000.
_INT2 = tl.constexpr("""
{ .reg .b32 a, b, c, d, e, f, g, h;
shl.b32 a, $16, 8; shl.b32 b, $16, 6; shl.b32 c, $16, 4; shl.b32 d, $16, 2;
shr.u32 f, $16, 2; shr.u32 g, $16, 4; shr.u32 h, $16, 6;
lop3.b32 a, a, 0x03000300, 0x44004400, 0xea; lop3.b32 b, b, 0x03000300, 0x44004400, 0xea;
lop3.b32 c, c, 0x03000300, 0x44004400, 0xea; lop3.b32 d, d, 0x03000300, 0x44004400, 0xea;
lop3.b32 e, $16, 0x03000300, 0x44004400, 0xea; lop3.b32 f, f, 0x03000300, 0x44004400, 0xea;
lop3.b32 g, g, 0x03000300, 0x44004400, 0xea; lop3.b32 h, h, 0x03000300, 0x44004400, 0xea;
fma.rn.f16x2 a, a, $17, $18; fma.rn.f16x2 b, b, $17, $18;
fma.rn.f16x2 c, c, $17, $18; fma.rn.f16x2 d, d, $17, $18;
fma.rn.f16x2 e, e, $17, $18; fma.rn.f16x2 f, f, $17, $18;
fma.rn.f16x2 g, g, $17, $18; fma.rn.f16x2 h, h, $17, $18;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; mov.b32 {$4, $5}, c; mov.b32 {$6, $7}, d;
mov.b32 {$8, $9}, e; mov.b32 {$10, $11}, f; mov.b32 {$12, $13}, g; mov.b32 {$14, $15}, h; }""")

#: A word of e4m3 codes ($4) -> 2 columns of both rows, divided by 256: sign, exponent and mantissa
#: where float16 has them, whose exponent bias is 8 higher. GPUs before 8.9 have no such cast.
_FP8 = tl.constexpr("""
{ .reg .b32 a, b, c;
shl.b32 a, $4, 8; shl.b32 b, $4, 7; shr.u32 c, $4, 1;
and.b32 a, a, 0x80008000; lop3.b32 a, b, 0x3f803f80, a, 0xea;
and.b32 b, $4, 0x80008000; lop3.b32 b, c, 0x3f803f80, b, 0xea;
mov.b32 {$0, $1}, a; mov.b32 {$2, $3}, b; }""")


@triton.constexpr_function
def with_last(shape, SIZE):
    """``[S...]`` -> ``[S..., SIZE]``."""
    return [*shape, SIZE]


@triton.constexpr_function
def pairs_of(shape):
    """``[S..., 2 * X]`` -> ``[S..., X, 2]``."""
    return [*shape[:-1], shape[-1] // 2, 2]


@triton.jit
def unpack_words(words, factors, BITS: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr):
    """Words of codes -> numbers.

    Args:
        words: int32 ``[S..., 2 * X]``, both words of each unit side by side.
        factors: int32 ``[S..., 2 * X]``: two float16 scales of each unit's rows, then two zeros.
            Not used for e4m3 codes.
        BITS: Of a code.
        NUMBER: float16, or float32 for comparisons.
        ASM: Whether to use instructions of a GPU; for float16.

    Returns:
        ``[S..., 2 * X, 2 * Y]`` with ``Y`` columns of a word, both rows of one column side by side;
        for e4m3 codes a 256th of the numbers.
    """
    scales, zeros = words, words
    if BITS != 8:
        scales, zeros = tl.split(tl.reshape(factors, pairs_of(words.shape)))
    if not ASM:
        return _unpack_plainly(words, scales, zeros, BITS, NUMBER)
    elif BITS == 8:
        a0, a1, b0, b1 = tl.inline_asm_elementwise(
            _FP8, "=h,=h,=h,=h,r", [words], dtype=(tl.float16,) * 4, is_pure=True, pack=1
        )
        return _last(tl.join(tl.join(a0, b0), tl.join(a1, b1)), words, 4)
    elif BITS == 4:
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            _INT4,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            [words, _of_words(scales, words), _of_words(_less(scales, zeros, LESS_16), words)],
            dtype=(tl.float16,) * 8,
            is_pure=True,
            pack=1,
        )
        # What is joined last varies fastest: the row, then the lowest bit of the column.
        first, second = _join4(a0, b0, c0, d0), _join4(a1, b1, c1, d1)
        return _last(tl.join(first, second), words, 8)
    else:
        a0, a1, b0, b1, c0, c1, d0, d1, e0, e1, f0, f1, g0, g1, h0, h1 = tl.inline_asm_elementwise(
            _INT2,
            "=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,=h,r,r,r",
            [words, _of_words(scales, words), _of_words(_less(scales, zeros, LESS_4), words)],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=1,
        )
        first = _join8(a0, b0, c0, d0, e0, f0, g0, h0)
        second = _join8(a1, b1, c1, d1, e1, f1, g1, h1)
        return _last(tl.join(first, second), words, 16)


@triton.jit
def _unpack_plainly(words, scales, zeros, BITS: tl.constexpr, NUMBER: tl.constexpr):
    """``unpack_words`` in plain operations, with the same roundings."""
    RANK: tl.constexpr = len(words.shape)
    place = tl.arange(0, 32 // BITS)
    column, row = place // 2, place % 2
    for _ in tl.static_range(RANK):
        column, row = tl.expand_dims(column, 0), tl.expand_dims(row, 0)
    codes = (tl.expand_dims(words, RANK) >> (row * 16 + column * BITS)) & ((1 << BITS) - 1)
    if BITS == 8:
        half = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        return half.to(tl.int16).to(tl.float16, bitcast=True).to(NUMBER)
    else:
        scale = _half(tl.expand_dims(_of_words(scales, words), RANK), row)
        zero = _half(tl.expand_dims(_of_words(zeros, words), RANK), row)
        if tl.float32 == NUMBER:
            return codes.to(tl.float32) * scale + zero
        else:
            offset: tl.constexpr = 16.0 if BITS == 4 else 4.0
            less = (zero - offset * scale).to(NUMBER).to(tl.float32)
            return ((codes.to(tl.float32) + offset) * scale + less).to(NUMBER)


@triton.jit
def _half(pairs, row):
    """One of two float16 numbers in an int32, as float32."""
    bits = (pairs >> (row * 16)) & 0xFFFF
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _less(scales, zeros, OFFSET: tl.constexpr):
    """``zeros - offset * scales`` of both rows; OFFSET holds the negative offset twice."""
    offset = tl.full(scales.shape, OFFSET, tl.int32)
    return tl.inline_asm_elementwise(
        _OFFSET, "=r,r,r,r", [scales, zeros, offset], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _of_words(numbers, words):
    """``[S..., X]`` per unit -> ``[S..., 2 * X]`` per word."""
    return tl.reshape(tl.join(numbers, numbers), words.shape)


@triton.jit
def _join4(a, b, c, d):
    """Columns 0 to 3 -> ``[..., 2, 2]``, in order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _join8(a, b, c, d, e, f, g, h):
    """Columns 0 to 7 -> ``[..., 2, 2, 2]``, in order."""
    return tl.join(_join4(a, c, e, g), _join4(b, d, f, h))


@triton.jit
def _last(joined, words, SIZE: tl.constexpr):
    """Make one dimension of those that were joined."""
    return tl.reshape(joined, with_last(words.shape, SIZE))


@triton.jit
def natural_order(tile, COLUMNS: tl.constexpr, SHARED: tl.constexpr):
    """Rows ``[R, X]`` of a tile in the order of its threads -> in order.

    Args:
        tile: Row ``(u * COLUMNS + c) * SHARED + s`` stands for ``(u * SHARED + s) * COLUMNS + c``.
        COLUMNS: Of a unit.
        SHARED: Units that lie in different threads.
    """
    ROWS: tl.constexpr = tile.shape[0]
    WIDTH: tl.constexpr = tile.shape[1]
    apart = tl.reshape(tile, [ROWS // (COLUMNS * SHARED), COLUMNS, SHARED, WIDTH])
    return tl.reshape(tl.permute(apart, (0, 2, 1, 3)), [ROWS, WIDTH])


@triton.jit
def load_keys(
    kv_ptr, entries, head_offset, block_stride, first, channel,
    CHANNELS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Load quantized keys of a span, across its thin blocks: ``[TILE, CHANNELS]`` of NUMBER.

    Tokens from ``first`` on, a multiple of TILE, in the order that ``natural_order`` mends; behind
    the last one of the span are some of its others. Channels from ``channel`` on, in the order of
    ``queries.channel_order``; those from C on are finite. ``entries`` points to the span's block
    numbers, ``head_offset`` are the bytes from the start of a block to the run.
    """
    KEYS: tl.constexpr = L.KEYS
    COLUMNS: tl.constexpr = 32 // KEYS.BITS
    OUTER: tl.constexpr = L.TILE // (LANES * COLUMNS)
    # Units of neighbouring rows that a thread loads at once, 8 bytes each.
    AT_ONCE: tl.constexpr = 2 if L.C % 4 == 0 else 1
    WORDS: tl.constexpr = 8 * AT_ONCE  # of the four threads that share a token's channels
    TIMES: tl.constexpr = CHANNELS // WORDS
    LAST: tl.constexpr = (L.SPAN * L.N + COLUMNS - 1) // COLUMNS - 1
    unit = first // COLUMNS + tl.arange(0, OUTER)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    unit = tl.minimum(unit, LAST)
    run = find_pages(kv_ptr, entries, unit // (L.T // COLUMNS), head_offset, block_stride)
    run = run.to(tl.pointer_type(tl.int32), bitcast=True)
    place = unit % (L.T // COLUMNS)
    times = channel + tl.arange(0, TIMES)[None, :, None, None] * WORDS
    word = times + tl.arange(0, WORDS)[None, None, None, :]
    words = tl.load((run + place * L.C)[:, None, :, None] + word)
    factors = words
    if KEYS.BITS != 8:
        # What is no channel has a query of zero, which a NaN would survive.
        factor = KEYS.SCALES // 4 + place * COLUMNS // KEYS.GROUP * L.C
        factors = tl.load((run + factor)[:, None, :, None] + word, mask=word < L.C, other=0)
    numbers = unpack_words(words, factors, KEYS.BITS, L.NUMBER, L.ASM)
    Y: tl.constexpr = COLUMNS // 2
    if AT_ONCE == 2:
        numbers = tl.reshape(numbers, [OUTER, TIMES, LANES, 4, 2, 2, Y, 2])
        numbers = tl.permute(numbers, (0, 5, 6, 2, 1, 3, 4, 7))
    else:
        numbers = tl.reshape(numbers, [OUTER, TIMES // 2, 2, LANES, 4, 2, Y, 2])
        numbers = tl.permute(numbers, (0, 5, 6, 3, 1, 4, 2, 7))
    return tl.reshape(numbers, [L.TILE, CHANNELS])


@triton.jit
def load_values(
    kv_ptr, entries, head_offset, block_stride, first_octet,
    TOKENS: tl.constexpr, STEP: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Load quantized values of a span, across its thin blocks: ``[V_PAD, TOKENS]`` of NUMBER.

    As ``load_keys``, but channels are in the order that ``natural_order`` mends, with
    ``shared_units``, and those behind the last one are some of the others. Tokens are in order: the
    octets ``first_octet``, ``first_octet + STEP`` and so on.
    """
    VALUES: tl.constexpr = L.VALUES
    COLUMNS: tl.constexpr = 32 // VALUES.BITS
    SHARED: tl.constexpr = shared_units(L.V_PAD, VALUES.BITS)
    OUTER: tl.constexpr = L.V_PAD // (SHARED * COLUMNS)
    TIMES: tl.constexpr = TOKENS // 16
    octet = tl.arange(0, TIMES)[:, None] * 2 + tl.arange(0, 2)[None, :]
    octet = tl.minimum(first_octet + octet * STEP, L.SPAN * L.N // 8 - 1)
    run = find_pages(kv_ptr, entries, octet // (L.T // 8), head_offset, block_stride)
    run = run.to(tl.pointer_type(tl.int32), bitcast=True)
    place = octet % (L.T // 8)
    unit = tl.arange(0, OUTER)[:, None] * SHARED + tl.arange(0, SHARED)[None, :]
    unit = tl.minimum(unit, (L.V + COLUMNS - 1) // COLUMNS - 1)[:, None, :, None, None]
    at = (run + (VALUES.OFFSET // 4 + place * 8))[None, :, None, :, None]
    word = tl.arange(0, 8)[None, None, None, None, :]
    words = tl.load(at + (unit * L.T + word))
    factors = words
    if VALUES.BITS != 8:
        at = (run + (VALUES.SCALES // 4 + place * 8))[None, :, None, :, None]
        factors = tl.load(at + (unit * COLUMNS // VALUES.GROUP * L.T + word))
    numbers = unpack_words(words, factors, VALUES.BITS, L.NUMBER, L.ASM)
    numbers = tl.reshape(numbers, [OUTER, TIMES, SHARED, 2, 4, 2, COLUMNS // 2, 2])
    numbers = tl.permute(numbers, (0, 5, 6, 2, 1, 3, 4, 7))
    return tl.reshape(numbers, [L.V_PAD, TOKENS])


@triton.constexpr_function
def shared_units(V_PAD, BITS):
    """Units of a row of values that lie in different threads."""
    return min(8, V_PAD * BITS // 32)
