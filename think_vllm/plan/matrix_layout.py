"""The byte layout of the keys, or the values, of a thin block. Pure integers.

A matrix ``[R, X]`` has contiguous rows::

    plain    elements [R, X]              of the cache's dtype
    fp8      codes    [R, X]              float8 e4m3 (no infinities)
             scale    float32             one: element = zero_point[r] + code * scale
             zero points  float16 [R]     keys alone; for values they are 0
    int4,    codes    [R, X * bits / 8]   element x at bits bits * x.. of its row, little-endian
    int2     scales   float16 [G, R]      element = zero_point[x // g, r] + code * scale[x // g, r]
             zero points  float16 [G, R]  G = ceil(X / g) groups of g elements of a row

Codes lie in their ``R * ceil(X * bits / 8)`` bytes in one of two orders, for what reads them. On
CPUs rows are contiguous, as above. On NVIDIA GPUs two rows are interleaved, in **units** of 8
bytes, so that a thread finds in its registers what tensor cores take (``csrc_triton/units.py``)::

    unit  [X / (32 / bits), R / 2]        rows 2 r and 2 r + 1, 32 / bits columns of each:
          2 bytes of the one, 2 of the other, the next 2 of the one, the next 2 of the other

    scales   float16 [G, R / 2, 2, 2]     scales of the two rows, then their zero points

There ``X`` is rounded up to whole units, and ``R`` is even: quantized keys keep an even number of
channels.
"""

from dataclasses import dataclass

from think_vllm.plan.formats import Encoding

#: Parts start on a multiple of this, so that vector loads never straddle an element.
ALIGN_BYTES = 16
#: A unit of codes: two rows, and as many columns as that leaves.
UNIT_BYTES = 8


def align_up(num_bytes: int, alignment: int = ALIGN_BYTES) -> int:
    """Round ``num_bytes`` up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class MatrixLayout:
    """Byte offsets of a matrix, plain or quantized, inside a run."""

    encoding: Encoding  # how its elements are stored
    rows: int  # ``R``
    columns: int  # ``X``
    group: int  # elements of a row that share a scale, for integer encodings
    itemsize: int  # bytes of an element of the cache
    offset: int  # byte at which its codes start, a multiple of 16
    has_zero_points: bool = False  # for fp8, whether every row has a zero point

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return -(-self.columns * self.encoding.element_bits(self.itemsize) // 8)

    @property
    def unit_columns(self) -> int:
        """Columns of a unit, if quantized."""
        return 32 // self.encoding.value

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, in either order."""
        rows = self.rows * self.row_bytes
        if self.encoding is Encoding.PLAIN:
            return rows
        return max(rows, -(-self.columns // self.unit_columns) * -(-self.rows // 2) * UNIT_BYTES)

    @property
    def groups(self) -> int:
        """``G``: groups of a row; 0 if the encoding has none."""
        return -(-self.columns // self.group) if self.encoding.is_integer else 0

    @property
    def content_bytes(self) -> int:
        """Bytes of codes, scales and zero points, without the padding between them."""
        scales = 4 * self.groups * self.rows
        if self.encoding is Encoding.FP8:
            scales = 4 + (2 * self.rows if self.has_zero_points else 0)
        return self.rows * self.row_bytes + scales

    @property
    def scales_offset(self) -> int:
        """Byte at which the scales start: behind the codes."""
        return align_up(self.offset + self.code_bytes)

    @property
    def zero_points_offset(self) -> int:
        """Byte at which the zero points start, if there are any: behind the scales."""
        scales = 4 if self.encoding is Encoding.FP8 else 2 * self.groups * self.rows
        return align_up(self.scales_offset + scales)

    @property
    def end(self) -> int:
        """First byte behind the matrix."""
        if self.encoding is Encoding.PLAIN:
            return self.offset + self.rows * self.row_bytes
        if self.encoding is Encoding.FP8:
            return (
                self.zero_points_offset + 2 * self.rows
                if self.has_zero_points
                else self.scales_offset + 4
            )
        return self.zero_points_offset + 2 * self.groups * self.rows
