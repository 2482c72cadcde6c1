"""Writing quantized matrices: the rules of ``kernels/reference/quantization.py``, to the bit.

A GPU and Triton's interpreter give the same bits because divisions are IEEE's, nothing is rounded
but by IEEE's rules, and every NaN that is stored is written as bits. Kernels that use this compile
with ``enable_fp_fusion=False``: a product and a sum fused into one rounding would differ.
Elements travel as raw bits, sign-extended to int32, so plain ones are moved and never converted.
"""

import triton
import triton.language as tl

#: Bits of float32 numbers, and of NaNs as the reference writes them.
INFINITY_BITS = tl.constexpr(0x7F800000)
NAN_BITS = tl.constexpr(0x7FC00000)
HALF_NAN_BITS = tl.constexpr(0x7E00)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
#: 448, the largest e4m3 number; below 2 ** -6 e4m3 numbers are multiples of 2 ** -9.
FP8_MAX = tl.constexpr(448.0)
FP8_MAX_BITS = tl.constexpr(0x43E00000)
FP8_NORMAL_BITS = tl.constexpr((127 - 6) << 23)
FLOAT16_MAX = tl.constexpr(65504.0)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
#: Of 2 ** -24: smaller rows of fp8 keys have a zero of 0. Such zeros are made of ZERO_BITS bits.
SMALLEST_ZERO_BITS = tl.constexpr((127 - 24) << 23)
ZERO_BITS, LARGEST_STEP = tl.constexpr(15), tl.constexpr(2**15)
#: A float32 from here to its double has no fraction: adding this to a smaller number rounds it,
#: ties to even, and leaves the integer in the lowest bits.
INTEGER_FLOAT = tl.constexpr(2.0**23)
#: The same for numbers of both signs, and its bits.
SIGNED_FLOAT = tl.constexpr(1.5 * 2.0**23)
SIGNED_FLOAT_BITS = tl.constexpr(0x4B400000)


@triton.jit
def element_pointer(pointer, SIZE: tl.constexpr):
    """Byte pointers -> pointers to integers of ``SIZE`` bytes.

    To be called before offsets are added: Triton sees that neighbouring elements are neighbours,
    and moves several at once, only if their pointers count in elements.
    """
    if SIZE == 4:
        return pointer.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        return pointer.to(tl.pointer_type(tl.int16), bitcast=True)


@triton.jit
def load_bits(pointer, mask):
    """Load elements from an ``element_pointer`` as int32."""
    return tl.load(pointer, mask=mask, other=0).to(tl.int32)


@triton.jit
def store_bits(pointer, bits, mask):
    """Undo ``load_bits``."""
    tl.store(pointer, bits.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def as_float(bits, DTYPE: tl.constexpr):
    """Elements -> float32, exactly."""
    if DTYPE.is_bf16():
        return (bits << 16).to(tl.float32, bitcast=True)
    elif DTYPE.is_fp16():
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_half_bits(value):
    """Float32 -> bits of the nearest float16, as int32."""
    return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def fp8_inverse(top):
    """The scale of an fp8 matrix, and what its elements are multiplied with.

    Args:
        top: Bits of the largest magnitude, int32. Such bits sort like magnitudes, NaN on top.

    Returns:
        Bits of the scale, and its inverse, float32: 0 for a scale of 0.
    """
    scale = tl.div_rn(top.to(tl.float32, bitcast=True), FP8_MAX)
    scale = tl.where(scale < SMALLEST_NORMAL, 0.0, scale)
    empty = scale == 0.0
    inverse = tl.where(empty, 0.0, tl.div_rn(1.0, tl.where(empty, 1.0, scale)))
    bits = tl.where(top > INFINITY_BITS, NAN_BITS, scale.to(tl.int32, bitcast=True))
    return bits, inverse


@triton.jit
def fp8_zeros(values, mask, count):
    """The zeros of rows of fp8 keys.

    Args:
        values: ``[R, X]`` float32.
        mask: ``[R, X]``: what belongs to the matrix.
        count: How many that are in a row, at least 1.

    Returns:
        Bits of float16 numbers, ``[R]`` int32.
    """
    magnitudes = tl.where(mask, values.to(tl.int32, bitcast=True) & MAGNITUDE, 0)
    top = tl.max(magnitudes, axis=1)
    usable = (top >= SMALLEST_ZERO_BITS) & (top < INFINITY_BITS)
    # Powers of two between elements and steps: the exponent's bias is 127.
    exponent = tl.where(usable, top >> 23, 127) - (126 + ZERO_BITS)
    up = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    down = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    steps = tl.where(mask & usable[:, None], values, 0.0) * up[:, None] + SIGNED_FLOAT
    steps = steps.to(tl.int32, bitcast=True) - SIGNED_FLOAT_BITS
    mean = integer_mean(tl.sum(steps, axis=1), count)
    distance = tl.where(mask, tl.abs(steps - mean[:, None]), 0)
    near = mask & (distance <= (tl.sum(distance, axis=1) // count)[:, None])
    total = tl.sum(tl.where(near, steps, 0), axis=1)
    mean = integer_mean(total, tl.maximum(tl.sum(near.to(tl.int32), axis=1), 1))
    change = tl.where(mask, tl.abs(steps - mean[:, None]) - tl.abs(steps), 0)
    zero = tl.where(tl.sum(change, axis=1) < 0, mean, 0).to(tl.float32) * down
    return as_half_bits(tl.minimum(tl.maximum(zero, -FLOAT16_MAX), FLOAT16_MAX))


@triton.jit
def integer_mean(total, count):
    """``total / count`` rounded down, of steps; divisions of negative numbers round up."""
    return (total + count * LARGEST_STEP) // count - LARGEST_STEP


@triton.jit
def fp8_codes(value):
    """The nearest e4m3 codes, ties to even; beyond 448 the highest, 0 for NaN. As int32."""
    value = tl.where(value == value, value, 0.0)
    bits = value.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & MAGNITUDE, FP8_MAX_BITS)
    small = magnitude.to(tl.float32, bitcast=True) * 512.0 + INTEGER_FLOAT
    small = small.to(tl.int32, bitcast=True) & 0xF
    # Exponent biases are 127 and 7; 3 of 23 bits of the mantissa stay.
    odd = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + odd) >> 20) - ((127 - 7) << 3)
    code = tl.where(magnitude < FP8_NORMAL_BITS, small, normal)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def sort_key(bits):
    """Bits of float32 numbers <-> integers that sort like the numbers, NaNs at both ends."""
    return bits ^ ((bits >> 31) & MAGNITUDE)


@triton.jit
def integer_codes(values, mask, BITS: tl.constexpr):
    """Code one group per row.

    Args:
        values: ``[R, GROUP]`` float32.
        mask: ``[R, GROUP]``: what belongs to the group; at least one of each row that is used.
        BITS: Of a code.

    Returns:
        Codes ``[R, GROUP]`` int32, 0 where the mask is not set; bits of the float16 scales and
        zeros, both ``[R]`` int32.
    """
    LEVELS: tl.constexpr = 2.0**BITS - 1.0
    keys = sort_key(values.to(tl.int32, bitcast=True))
    low = sort_key(tl.min(tl.where(mask, keys, 0x7FFFFFFF), axis=1))
    high = sort_key(tl.max(tl.where(mask, keys, -0x80000000), axis=1))
    low = low.to(tl.float32, bitcast=True)
    width = high.to(tl.float32, bitcast=True) - low
    scale_bits = as_half_bits(tl.div_rn(width, LEVELS))
    zero_bits = as_half_bits(tl.minimum(tl.maximum(low, -FLOAT16_MAX), FLOAT16_MAX))
    scale_bits = tl.where(width == width, scale_bits, HALF_NAN_BITS)
    zero_bits = tl.where(width == width, zero_bits, HALF_NAN_BITS)
    scale, zero = as_float(scale_bits, tl.float16), as_float(zero_bits, tl.float16)
    empty = scale == 0.0
    inverse = tl.where(empty, 0.0, tl.div_rn(1.0, tl.where(empty, 1.0, scale)))
    position = (values - zero[:, None]) * inverse[:, None]
    position = tl.where(mask & (position > 0.0), position, 0.0)  # NaN too
    position = tl.where(position < LEVELS, position, LEVELS)
    codes = (position + INTEGER_FLOAT).to(tl.int32, bitcast=True) & 0xFF
    return codes, scale_bits, zero_bits


@triton.jit
def pack(codes, BITS: tl.constexpr):
    """``[R, X]`` codes -> ``[R, X * BITS / 8]`` bytes, both int32; the first code lowest."""
    ROWS: tl.constexpr = codes.shape[0]
    BYTES: tl.constexpr = codes.shape[1] * BITS // 8
    PARTS: tl.constexpr = 8 // BITS
    parts = tl.reshape(codes, (ROWS, BYTES, PARTS))
    return tl.sum(parts << (tl.arange(0, PARTS) * BITS)[None, None, :], axis=2)


@triton.jit
def unit_byte(row, byte, ROWS: tl.constexpr):
    """Where a byte of a row of codes is among the units of a matrix of ROWS rows."""
    unit = byte // 4 * (ROWS // 2) + row // 2
    return unit * 8 + byte // 2 % 2 * 4 + row % 2 * 2 + byte % 2


@triton.jit
def put_tile(
    run, bits, rows, columns, row_mask, column_mask, zero, inverse,
    M: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write a tile of a matrix.

    Args:
        run: Byte pointer to the run.
        bits: Elements ``[R, X]``; for integer encodings ``X = GROUP``, a group of each row.
        rows: Row numbers ``[R]``.
        columns: Column numbers ``[X]``, ascending by 1.
        row_mask: Rows that hold something.
        column_mask: Columns that hold something; whole bytes of codes.
        zero: For fp8, of the rows, float32 ``[R, 1]``.
        inverse: For fp8, of the matrix's scale.
        M: The ``Matrix``. An even number of rows where there are codes.
        DTYPE: Of an element.
    """
    mask = row_mask[:, None] & column_mask[None, :]
    if M.BITS == 0:
        SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
        start = element_pointer(run + M.OFFSET + rows * M.ROW, SIZE)
        store_bits(start[:, None] + columns[None, :], bits, mask)
    elif M.BITS == 8:
        codes = fp8_codes((as_float(bits, DTYPE) - zero) * inverse)
        target = run + M.OFFSET + unit_byte(rows[:, None], columns[None, :], M.ROWS)
        tl.store(target, codes.to(tl.uint8), mask=mask)
    else:
        BITS: tl.constexpr = M.BITS
        BYTES: tl.constexpr = M.GROUP * BITS // 8
        codes, scales, zeros = integer_codes(as_float(bits, DTYPE), mask, BITS)
        first = tl.min(columns, axis=0)
        byte = tl.arange(0, BYTES)
        # The last column that holds something is the last of its byte.
        held = (first + byte * (8 // BITS)) <= tl.max(tl.where(column_mask, columns, -1), axis=0)
        place = (first * BITS // 8 + byte)[None, :]
        target = run + M.OFFSET + unit_byte(rows[:, None], place, M.ROWS)
        packed = pack(codes, BITS).to(tl.uint8)
        tl.store(target, packed, mask=row_mask[:, None] & held[None, :])
        # Scales of two rows, then their zeros.
        factor = first // M.GROUP * (2 * M.ROWS) + rows // 2 * 4 + rows % 2
        factor_at = element_pointer(run + M.SCALES, 2) + factor
        store_bits(factor_at, scales, row_mask)
        store_bits(factor_at + 2, zeros, row_mask)
