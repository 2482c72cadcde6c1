"""Encoding matrices of keys and values, in plain torch. The rules that every kernel keeps to.

All arithmetic is float32, in the order written here, so that kernels can be bit-exact. A NaN or
an infinity in a group (fp8: in a matrix) turns that whole group into NaN when it is read: the
request that owns it shows that its model is broken, and no other request notices.
"""

from dataclasses import dataclass

import torch

from think_vllm.plan.formats import FP8_MAX, Encoding
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.matrix_layout import MatrixLayout

FLOAT16_MAX = 65_504.0
#: Of float32. The inverse of a smaller scale would overflow.
SMALLEST_NORMAL = 2.0**-126
#: Rows with smaller elements alone get a zero of 0: float16 numbers end there.
SMALLEST_ZERO = 2.0**-24
#: Bits of the fixed-point numbers of which zeros are made.
ZERO_BITS = 15


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix."""

    codes: torch.Tensor  # ``[R, X]`` uint8, one code per byte; for fp8 the bits of float8 e4m3
    scales: torch.Tensor  # ``[G, R]`` float16; for fp8 ``[]`` float32
    zeros: torch.Tensor | None  # ``[G, R]`` float16; for fp8 ``[R]``, or None


def fp8_zeros(elements: torch.Tensor) -> torch.Tensor:
    """Choose a zero for each row of keys ``[R, X]`` float32: ``[R]`` float16.

    A key bias moves a channel away from 0 for all tokens (rotary positions turn it, slowly in the
    last channels of each half). The zero is where most tokens are: the mean of those that are no
    farther from the mean of all than the average. So one token that differs, as a first one often
    does, does not move it. It is 0 where that would not make elements smaller, by the sum of their
    magnitudes, and where the row has something that is not finite.

    Sums are of integers, and so do not depend on the order in which they are made: elements are
    rounded to multiples of 2 ** -15 of the least power of two above the row. Beyond float16's
    65,504 a zero saturates.
    """
    top = elements.abs().amax(dim=1)
    usable = top.isfinite() & (top >= SMALLEST_ZERO)
    exponent = torch.frexp(torch.where(usable, top, 1.0)).exponent - ZERO_BITS
    steps = torch.ldexp(torch.where(usable[:, None], elements, 0.0), -exponent[:, None])
    steps = steps.round().long()
    ones = torch.ones_like(steps)
    distance = (steps - _integer_mean(steps, ones)[:, None]).abs()
    near = (distance <= distance.sum(dim=1, keepdim=True) // steps.shape[1]).long()
    zero = _integer_mean(steps, near)
    smaller = (steps - zero[:, None]).abs().sum(dim=1) < steps.abs().sum(dim=1)
    zero = torch.ldexp(torch.where(smaller, zero, 0).float(), exponent)
    return zero.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()


def _integer_mean(steps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Means of rows, rounded down: ``[R]`` int64. Weights are 0 or 1."""
    return (steps * weights).sum(dim=1).div(weights.sum(dim=1), rounding_mode="floor")


def quantize_fp8(matrix: torch.Tensor, has_zero_points: bool = False) -> Quantized:
    """Code ``[R, X]`` in float8 e4m3 with one scale: its largest magnitude becomes 448.

    A code is the nearest one, ties to even; the error is at most 2 ** -4 of the element, or
    2 ** -10 scales for elements below 2 ** -6 scales. Matrices below 5e-36 become zero. With
    ``has_zero_points`` that goes for what is left of the elements without their row's zero point.
    """
    elements = matrix.float()
    zeros = fp8_zeros(elements) if has_zero_points else None
    if zeros is not None:
        elements = elements - zeros.float()[:, None]
    scale = elements.abs().amax() / FP8_MAX
    scale = torch.where(scale.isnan(), torch.nan, scale)  # one bit pattern for every NaN
    scale = torch.where(scale < SMALLEST_NORMAL, 0.0, scale)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    scaled = (elements * inverse).nan_to_num(0.0, posinf=FP8_MAX, neginf=-FP8_MAX)
    codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return Quantized(codes, scale, zeros)


def quantize_integer(matrix: torch.Tensor, bits: int, group: int) -> Quantized:
    """Code ``[R, X]`` in asymmetric integers; ``group`` elements of a row share scale and zero.

    Source: KIVI, arXiv 2402.02750, section 3.1: ``zero = min``, ``scale = (max - min) / (2 **
    bits - 1)``, both rounded to float16 before the codes are chosen. The error is at most half a
    scale, plus what the rounding of zero and scale takes away at the ends of the range:
    2 ** -11 of the largest magnitude, plus 2 ** -11 of the range, plus ``2 ** bits`` times
    2 ** -25 where float16 is subnormal. A zero beyond float16's 65,504 saturates; a range of
    more than 65,504 scales becomes NaN, as infinities do.
    """
    elements = matrix.float()
    levels = 2**bits - 1
    codes, scales, zeros = [], [], []
    for part in torch.split(elements, group, dim=1):
        low, high = part.amin(dim=1), part.amax(dim=1)
        scale = ((high - low) / levels).half()
        scale = torch.where(scale.isnan(), torch.nan, scale)  # one bit pattern for every NaN
        zero = low.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
        zero = torch.where(scale.isnan(), scale, zero)
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
        position = (part - zero.float()[:, None]) * inverse[:, None]
        code = position.round().nan_to_num(0.0).clamp(0, levels)
        codes.append(code.to(torch.uint8))
        scales.append(scale)
        zeros.append(zero)
    return Quantized(torch.cat(codes, dim=1), torch.stack(scales), torch.stack(zeros))


def dequantize(quantized: Quantized, group: int) -> torch.Tensor:
    """``[R, X]`` float64: what a quantized matrix stands for, without further rounding."""
    scales = quantized.scales.double()
    if quantized.scales.dim() == 0:
        elements = quantized.codes.view(torch.float8_e4m3fn).double() * scales
        return elements if quantized.zeros is None else elements + quantized.zeros.double()[:, None]
    assert quantized.zeros is not None
    columns = quantized.codes.shape[1]
    wide = scales.T.repeat_interleave(group, dim=1)[:, :columns]
    zeros = quantized.zeros.double().T.repeat_interleave(group, dim=1)[:, :columns]
    return zeros + quantized.codes.double() * wide


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, X]`` uint8 codes -> ``[R, X * bits / 8]`` uint8, the first code in the lowest bits."""
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte))
    shifts = torch.arange(per_byte) * bits
    parts: torch.Tensor = padded.view(codes.shape[0], -1, per_byte).int() << shifts
    return parts.sum(dim=2).to(torch.uint8)


def unpack(packed: torch.Tensor, bits: int, columns: int) -> torch.Tensor:
    """Undo ``pack``: ``[R, columns]`` uint8."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte) * bits
    codes: torch.Tensor = (packed.int()[:, :, None] >> shifts) & (2**bits - 1)
    return codes.view(packed.shape[0], -1)[:, :columns].to(torch.uint8)


def code_and_back(
    matrix: torch.Tensor, encoding: Encoding, group: int, has_zero_points: bool = False
) -> torch.Tensor:
    """What becomes of ``[R, X]`` when it is quantized and read again, float64.

    ``has_zero_points`` is about fp8: keys of thin blocks have zeros there, nothing else has.
    """
    if encoding is Encoding.PLAIN:
        return matrix.double()
    if encoding is Encoding.FP8:
        return dequantize(quantize_fp8(matrix, has_zero_points), group)
    return dequantize(quantize_integer(matrix, encoding.value, group), group)


def to_units(codes: torch.Tensor) -> torch.Tensor:
    """Bytes of whole units in rows ``[R, 4 * units]`` -> ``[units, R / 2, 8]``."""
    # [row pair, row, unit, word, byte] -> [unit, row pair, word, row, byte]
    pieces = codes.reshape(codes.shape[0] // 2, 2, -1, 2, 2)
    return pieces.permute(2, 0, 3, 1, 4).flatten(2)


def from_units(units: torch.Tensor) -> torch.Tensor:
    """Undo ``to_units``: ``[R, 4 * units]``."""
    pieces = units.view(*units.shape[:2], 2, 2, 2).permute(1, 3, 0, 2, 4)
    return pieces.reshape(2 * units.shape[1], -1)


def _read_codes(run: torch.Tensor, layout: MatrixLayout, form: BlockForm) -> torch.Tensor:
    """Codes of a matrix in rows, uint8 ``[R, row_bytes]``; a copy of whole units for GPUs."""
    if form is BlockForm.CPU or layout.encoding is Encoding.PLAIN:
        return run[layout.offset :][: layout.rows * layout.row_bytes].view(layout.rows, -1)
    return from_units(run[layout.offset :][: layout.code_bytes].view(-1, layout.rows // 2, 8))


def write_matrix(
    run: torch.Tensor, matrix: torch.Tensor, layout: MatrixLayout, form: BlockForm = BlockForm.CPU
) -> None:
    """Code a matrix into a run.

    Args:
        run: ``[run_bytes]`` uint8, a view of the cache. Written.
        matrix: ``[R', X']`` of the cache's dtype with ``R' <= R`` and ``X' <= X``: the last
            block of a span may hold fewer tokens.
        layout: Where it goes.
        form: For what.
    """
    rows, columns = matrix.shape
    encoding = layout.encoding
    codes = _read_codes(run, layout, form)
    if encoding is Encoding.PLAIN:
        codes.view(matrix.dtype)[:rows, :columns] = matrix
        return
    if encoding is Encoding.FP8:
        quantized = quantize_fp8(matrix, layout.has_zero_points)
        codes[:rows, :columns] = quantized.codes
        _put_units(run, codes, layout, form)
        scale = run[layout.scales_offset : layout.scales_offset + 4]
        scale.copy_(quantized.scales.view(1).view(torch.uint8))
        if quantized.zeros is not None:
            _fp8_zeros(run, layout)[:rows] = quantized.zeros
        return
    quantized = quantize_integer(matrix, encoding.value, layout.group)
    packed = pack(quantized.codes, encoding.value)
    codes[:rows, : packed.shape[1]] = packed
    _put_units(run, codes, layout, form)
    scales, zeros = _factors(run, layout, form)
    assert quantized.zeros is not None
    for held, made in ((scales, quantized.scales), (zeros, quantized.zeros)):
        held[: made.shape[0], :rows] = made
    _put_factors(run, (scales, zeros), layout, form)


def _put_units(
    run: torch.Tensor, codes: torch.Tensor, layout: MatrixLayout, form: BlockForm
) -> None:
    if form is BlockForm.GPU:
        run[layout.offset :][: codes.numel()] = to_units(codes).flatten()


def read_matrix(
    run: torch.Tensor,
    layout: MatrixLayout,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    form: BlockForm = BlockForm.CPU,
) -> torch.Tensor:
    """Read the first ``rows`` by ``columns`` elements of a matrix, float64.

    Args:
        run: ``[run_bytes]`` uint8.
        layout: Where it is.
        rows: Rows that hold something.
        columns: Columns that hold something.
        dtype: Of the cache.
        form: For what the run is laid out.
    """
    encoding = layout.encoding
    codes = _read_codes(run, layout, form)
    if encoding is Encoding.PLAIN:
        return codes.view(dtype)[:rows, :columns].double()
    if encoding is Encoding.FP8:
        scale = run[layout.scales_offset : layout.scales_offset + 4].clone().view(torch.float32)
        zeros = _fp8_zeros(run, layout)[:rows] if layout.has_zero_points else None
        return dequantize(Quantized(codes[:rows, :columns].clone(), scale[0], zeros), layout.group)
    scales, zeros = _factors(run, layout, form)
    groups = -(-columns // layout.group)
    quantized = Quantized(
        unpack(codes[:rows], encoding.value, columns), scales[:groups, :rows], zeros[:groups, :rows]
    )
    return dequantize(quantized, layout.group)


def _fp8_zeros(run: torch.Tensor, layout: MatrixLayout) -> torch.Tensor:
    """Zeros of an fp8 matrix, ``[R]`` float16, a view."""
    return run[layout.zero_points_offset : layout.end].view(torch.float16)


def _factors(
    run: torch.Tensor, layout: MatrixLayout, form: BlockForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros, both ``[G, R]`` float16; copies for GPUs, else views."""
    groups, rows = layout.groups, layout.rows
    numbers = run[layout.scales_offset : layout.end].view(torch.float16)
    if form is BlockForm.CPU:
        zeros = numbers[(layout.zero_points_offset - layout.scales_offset) // 2 :]
        return numbers[: groups * rows].view(groups, rows), zeros.view(groups, rows)
    pairs = numbers[: 2 * groups * rows].view(groups, rows // 2, 2, 2)
    return pairs[:, :, 0].reshape(groups, rows), pairs[:, :, 1].reshape(groups, rows)


def _put_factors(
    run: torch.Tensor, factors: tuple[torch.Tensor, ...], layout: MatrixLayout, form: BlockForm
) -> None:
    if form is BlockForm.GPU:
        numbers = run[layout.scales_offset : layout.end].view(torch.float16)
        pairs = torch.stack([held.view(layout.groups, -1, 2) for held in factors], dim=2)
        numbers[: pairs.numel()] = pairs.flatten()
