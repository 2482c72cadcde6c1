"""Writing quantized matrices: the rules of ``kernels/reference/quantization.py``, to the bit.

No fast-math anywhere here: float32 operations in the reference's order give its bits.
"""

from collections.abc import Callable

import numpy as np
from numba import njit
from numba.extending import overload

from think_vllm.kernels.cpu.blocks import Fp8Keys, Fp8Matrix, Int2Matrix, Int4Matrix, PlainMatrix
from think_vllm.kernels.cpu.compiling import named
from think_vllm.kernels.cpu.elements import (
    bits_to_float32,
    copy_elements,
    element_to_float32,
    float32_to_bits,
    float32_to_element,
)
from think_vllm.kernels.cpu.softmax import row_max
from think_vllm.plan.formats import FP8_MAX

FLOAT16_MAX = np.float32(65_504.0)
FLOAT16_NAN = np.int16(0x7E00)
HIGHEST_CODE = np.float32(FP8_MAX)
SMALLEST_NORMAL = np.float32(2.0**-126)
INFINITY_BITS = np.int32(0x7F800000)
#: Of 2 ** -24: smaller rows of fp8 keys have a zero of 0.
SMALLEST_ZERO_BITS = np.int32((127 - 24) << 23)
#: Bits of the fixed-point numbers of which such zeros are made.
ZERO_BITS = 15
#: Of steps, which are fixed-point numbers. No two of them are farther apart.
ORIGIN, FARTHEST = np.int64(0), np.int64(2 << ZERO_BITS)
ZERO, ONE, NAN = np.float32(0.0), np.float32(1.0), np.float32(np.nan)


def put_matrix(
    cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
):
    """Code a matrix into a run, in compiled code only.

    Args:
        cache: The ``Cache``. Written.
        run: Offset of the run, in elements.
        matrix: Where in the run, and how quantized.
        itemsize: Bytes of an element.
        source: Flat elements; holds ``[num_rows, columns]``.
        source_at: Offset of its first element.
        source_stride: Elements between its rows.
        num_rows: Rows that hold something.
        columns: Columns that hold something.
        floats: Flat float32 scratch for ``columns`` numbers.
    """
    raise NotImplementedError


def _put_plain(
    cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
):
    for row in range(num_rows):
        copy_elements(
            cache.elements,
            run + matrix.offset + row * matrix.row_stride,
            source,
            source_at + row * source_stride,
            columns,
        )


@njit
def _load(elements, floats):
    for x in range(len(elements)):
        floats[x] = element_to_float32(elements[x])


@njit
def _largest_magnitude(elements):
    """Largest magnitude, NaN if one is NaN: bits without a sign sort like magnitudes."""
    top = np.int32(0)
    for x in range(len(elements)):
        top = max(top, float32_to_bits(element_to_float32(elements[x])) & np.int32(0x7FFFFFFF))
    return bits_to_float32(np.int32(top))


@njit
def _fp8_code(value):
    """The e4m3 code nearest to a float32, ties to even; beyond 448 the highest, NaN is 0."""
    value = ZERO if value != value else value
    value = min(max(value, -HIGHEST_CODE), HIGHEST_CODE)
    bits = float32_to_bits(value)
    sign = (bits >> np.int32(24)) & np.int32(0x80)
    magnitude = bits & np.int32(0x7FFFFFFF)
    # Below 2 ** -6 codes are multiples of 2 ** -9.
    small = np.int32(np.rint(bits_to_float32(magnitude) * np.float32(512.0)))
    odd = (magnitude >> np.int32(20)) & np.int32(1)
    # Exponent biases are 127 and 7; 3 of 23 bits of the mantissa stay.
    normal = ((magnitude + np.int32(0x7FFFF) + odd) >> np.int32(20)) - np.int32((127 - 7) << 3)
    code = small if magnitude < np.int32((127 - 6) << 23) else normal
    return np.uint8(code | sign)


def _put_fp8(
    cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
):
    top = ZERO
    for row in range(num_rows):
        start = source_at + row * source_stride
        largest = _largest_magnitude(source[start : start + columns])
        top = top if top >= largest or top != top else largest
    scale, inverse = _fp8_scale(top)
    first = run * itemsize
    cache.floats[first // 4 + matrix.scale] = scale
    for row in range(num_rows):
        start = source_at + row * source_stride
        target = first + matrix.offset + row * matrix.row_stride
        _encode_fp8(
            source[start : start + columns], ZERO, inverse, cache.bytes[target : target + columns]
        )


def _put_fp8_keys(
    cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
):
    first = run * itemsize
    zeros = cache.halves[first // 2 + matrix.zeros : first // 2 + matrix.zeros + num_rows]
    row_floats = floats[:columns]
    top = ZERO
    for row in range(num_rows):
        start = source_at + row * source_stride
        _load(source[start : start + columns], row_floats)
        zeros[row] = _fp8_zero(row_floats)
        zero = element_to_float32(zeros[row])
        for x in range(columns):
            row_floats[x] -= zero
        largest = _largest_magnitude(row_floats)
        top = top if top >= largest or top != top else largest
    scale, inverse = _fp8_scale(top)
    cache.floats[first // 4 + matrix.scale] = scale
    for row in range(num_rows):
        start = source_at + row * source_stride
        target = first + matrix.offset + row * matrix.row_stride
        _encode_fp8(
            source[start : start + columns],
            element_to_float32(zeros[row]),
            inverse,
            cache.bytes[target : target + columns],
        )


@njit
def _fp8_scale(top):
    """The scale of an fp8 matrix, by its largest magnitude, and what elements are times."""
    scale = top / HIGHEST_CODE if top == top else NAN
    scale = ZERO if scale < SMALLEST_NORMAL else scale
    return scale, ZERO if scale == ZERO else ONE / scale


@njit
def _encode_fp8(elements, zero, inverse, codes):
    for x in range(len(elements)):
        codes[x] = _fp8_code((element_to_float32(elements[x]) - zero) * inverse)


@njit
def _sum_steps(values, up, mean, most):
    """Sum and number of the steps that are within ``most`` of a mean."""
    total, near = ORIGIN, ORIGIN
    for x in range(len(values)):
        step = np.int32(np.rint(values[x] * up))
        is_near = abs(step - mean) <= most
        total += step if is_near else ORIGIN
        near += is_near
    return total, near


@njit
def _sum_distances(values, up, mean):
    """Sum of distances between steps and a mean."""
    total = ORIGIN
    for x in range(len(values)):
        total += abs(np.int32(np.rint(values[x] * up)) - mean)
    return total


@njit
def _fp8_zero(values):
    """The zero of a row of fp8 keys, float16 bits: ``reference.quantization.fp8_zeros``."""
    top = float32_to_bits(_largest_magnitude(values))
    if top < SMALLEST_ZERO_BITS or top >= INFINITY_BITS:
        return np.int16(0)
    # Powers of two between elements and steps: the exponent's bias is 127.
    exponent = np.int32(top >> np.int32(23)) - np.int32(126 + ZERO_BITS)
    down = bits_to_float32(np.int32((127 + exponent) << 23))
    up = bits_to_float32(np.int32((127 - exponent) << 23))
    count = len(values)
    mean = _sum_steps(values, up, ORIGIN, FARTHEST)[0] // count
    most = _sum_distances(values, up, mean) // count
    total, near = _sum_steps(values, up, mean, most)
    mean = total // near
    if _sum_distances(values, up, mean) >= _sum_distances(values, up, ORIGIN):
        return np.int16(0)
    zero = np.float32(mean) * down
    return float32_to_element(min(max(zero, -FLOAT16_MAX), FLOAT16_MAX), FLOAT16_NAN)


@njit
def _row_min(values):
    """Smallest value of a row, by the order of ``row_max``: a NaN shows in either of them."""
    low = np.int32(0x7FFFFFFF)
    for x in range(len(values)):
        bits = float32_to_bits(values[x])
        low = min(low, bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return bits_to_float32(np.int32(low ^ ((low >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit
def _encode_integers(values, zero, inverse, levels):
    """Replace values by their codes, as whole numbers."""
    for x in range(len(values)):
        code = np.rint((values[x] - zero) * inverse)
        code = code if code > ZERO else ZERO  # NaN too
        values[x] = code if code < levels else levels


def _make_put_integers(bits: int) -> Callable[..., None]:
    per_byte = 8 // bits
    levels = np.float32(2**bits - 1)

    @njit
    @named(bits)
    def pack(values, codes):
        for i in range(len(values) // per_byte):
            byte = np.uint8(0)
            for k in range(per_byte):
                byte |= np.uint8(np.int32(values[i * per_byte + k]) << (k * bits))
            codes[i] = byte

    @named(bits)
    def put_integers(
        cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
    ):
        first = run * itemsize
        for row in range(num_rows):
            start = source_at + row * source_stride
            row_floats = floats[:columns]
            _load(source[start : start + columns], row_floats)
            for x in range(0, columns, matrix.group):
                values = row_floats[x : min(x + matrix.group, columns)]
                low, high = _row_min(values), row_max(values)
                factor = first // 2 + x // matrix.group * matrix.rows + row
                scale_bits = float32_to_element((high - low) / levels, FLOAT16_NAN)
                scale = element_to_float32(scale_bits)
                zero_bits = float32_to_element(
                    min(max(low, -FLOAT16_MAX), FLOAT16_MAX), FLOAT16_NAN
                )
                if scale != scale:
                    scale_bits, zero_bits = FLOAT16_NAN, FLOAT16_NAN
                zero = element_to_float32(zero_bits)
                cache.halves[factor + matrix.scales] = scale_bits
                cache.halves[factor + matrix.zeros] = zero_bits
                inverse = ZERO if scale == ZERO else ONE / scale
                _encode_integers(values, zero, inverse, levels)
            target = first + matrix.offset + row * matrix.row_stride
            pack(row_floats, cache.bytes[target : target + columns // per_byte])

    return put_integers


_WRITERS = {
    PlainMatrix: _put_plain,
    Fp8Matrix: _put_fp8,
    Fp8Keys: _put_fp8_keys,
    Int4Matrix: _make_put_integers(4),
    Int2Matrix: _make_put_integers(2),
}


@overload(put_matrix)
def _choose_writer(
    cache, run, matrix, itemsize, source, source_at, source_stride, num_rows, columns, floats
):
    return _WRITERS[matrix.instance_class]
