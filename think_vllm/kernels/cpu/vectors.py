"""Vector IR that loads a stretch of a row and converts it to float32, one loader per encoding.

LLVM does not find these forms from scalar loops. It lowers them to whatever vectors the CPU
has; with AVX-512 each loader is a load and one to three operations per vector.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from llvmlite.ir import types as ir_types
from numba.core import cgutils

from think_vllm.kernels.cpu.elements import BFLOAT16, FLOAT16

#: Columns of a vector; rows are read in whole vectors.
LANES = 16
CACHE_LINE_BYTES = 64
#: AVX-512: 32 registers of 16 floats, and table look-ups in one of them.
WIDE_REGISTERS = bool(llvm.get_host_cpu_features().get("avx512f", False))

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOATS = ir.VectorType(ir.FloatType(), LANES)
WORDS = ir.VectorType(I32, LANES)


def constants(element: Any, values: list[int]) -> Any:
    """A constant vector."""
    return ir.Constant(ir.VectorType(element, len(values)), values)


def shuffle(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    """Pick lanes of two vectors."""
    return builder.shuffle_vector(first, second, constants(I32, order))


def broadcast(builder: Any, value: Any, lanes: int) -> Any:
    """A vector with ``value`` in every lane."""
    undefined = ir.Constant(ir_types.VectorType(value.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return shuffle(builder, one, one, [0] * lanes)


def _load(builder: Any, data: Any, at: Any, kind: Any, align: int) -> Any:
    pointer = builder.bitcast(builder.gep(data, [at]), kind.as_pointer())
    return builder.load(pointer, align=align)


def _shift(builder: Any, at: Any, by: int) -> Any:
    return builder.add(at, ir.Constant(I64, by))


class Loader:
    """Loads vectors of a row. ``bits`` is the size of a column."""

    bits = 0

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        """Load ``vectors`` vectors from ``data[at]`` on, in this loader's order of lanes."""
        raise NotImplementedError

    def to_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        """Columns in order -> this loader's order of lanes."""
        return vectors

    def from_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        """This loader's order of lanes -> columns in order."""
        return vectors


class _Float32(Loader):
    bits = 32

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        starts = [_shift(builder, at, v * LANES) for v in range(vectors)]
        return [_load(builder, data, start, FLOATS, 4) for start in starts]


class _Float16(Loader):
    bits = 16

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        halves = ir.VectorType(ir.HalfType(), LANES)
        starts = [_shift(builder, at, v * LANES) for v in range(vectors)]
        return [builder.fpext(_load(builder, data, s, halves, 2), FLOATS) for s in starts]


class _BFloat16(Loader):
    bits = 16

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        words = builder.zext(_load(builder, data, at, ir.VectorType(I16, LANES), 2), WORDS)
        return [builder.bitcast(builder.shl(words, constants(I32, [16] * LANES)), FLOATS)]


class _BFloat16Pairs(Loader):
    """A pair of vectors costs one load and two operations: even columns, then odd ones."""

    bits = 16

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        row = []
        for v in range(0, vectors, 2):
            pair = ir.VectorType(I16, 2 * LANES)
            words = _load(builder, data, _shift(builder, at, v * LANES), pair, 2)
            words = builder.bitcast(words, WORDS)
            row.append(builder.shl(words, constants(I32, [16] * LANES)))
            row.append(builder.and_(words, constants(I32, [0xFFFF0000] * LANES)))
        return [builder.bitcast(words, FLOATS) for words in row]

    def to_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
        return [
            shuffle(builder, vectors[v], vectors[v + 1], order)
            for v in range(0, len(vectors), 2)
            for order in (even, odd)
        ]

    def from_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        order = [column // 2 + LANES * (column % 2) for column in range(2 * LANES)]
        return [
            shuffle(builder, vectors[v], vectors[v + 1], half)
            for v in range(0, len(vectors), 2)
            for half in (order[:LANES], order[LANES:])
        ]


class _Fp8(Loader):
    """e4m3 -> float32 / 256: shifted by 7 bits it is a float16 whose bias is 8 higher.

    Every code becomes a finite number, so undefined bytes behind a row do no harm.
    """

    bits = 8

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        row = []
        for v in range(vectors):
            codes = _load(
                builder, data, _shift(builder, at, v * LANES), ir.VectorType(I8, LANES), 1
            )
            words = builder.sext(codes, ir.VectorType(I16, LANES))
            words = builder.shl(words, constants(I16, [7] * LANES))
            # The sign was extended into the exponent's highest bit.
            words = builder.and_(words, constants(I16, [0xBFFF] * LANES))
            halves = builder.bitcast(words, ir.VectorType(ir.HalfType(), LANES))
            row.append(builder.fpext(halves, FLOATS))
        return row


class _Integers(Loader):
    """Codes -> (code - middle) / 2 ** bits with middle = (2 ** bits - 1) / 2.

    Centred, because sums of what is all of one sign lose digits.
    """

    def _floats(self, builder: Any, words: Any, first_bits: list[int]) -> Any:
        values = [(code - ((1 << self.bits) - 1) / 2) / (1 << self.bits) for code in range(16)]
        if WIDE_REGISTERS:
            # A table that is looked up by the lowest 4 bits; those above a code do not matter.
            words = builder.lshr(words, constants(I32, first_bits))
            look_up = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(FLOATS, [FLOATS, WORDS]),
                "llvm.x86.avx512.permvar.sf.512",
            )
            period = 1 << self.bits
            table = ir.Constant(FLOATS, [values[lane % period] for lane in range(LANES)])
            return builder.call(look_up, [table, words])
        words = builder.lshr(words, constants(I32, first_bits))
        words = builder.and_(words, constants(I32, [(1 << self.bits) - 1] * LANES))
        step = ir.Constant(FLOATS, [values[1] - values[0]] * LANES)
        codes = builder.fmul(builder.sitofp(words, FLOATS), step)
        return builder.fadd(codes, ir.Constant(FLOATS, [values[0]] * LANES))


class _Int4(_Integers):
    """Even lanes hold the first 8 of 16 columns, odd lanes the last 8."""

    bits = 4

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        row = []
        for v in range(vectors):
            word = _load(builder, data, _shift(builder, at, v * 8), I64, 1)
            words = builder.bitcast(broadcast(builder, word, LANES // 2), WORDS)
            row.append(self._floats(builder, words, [4 * (lane // 2) for lane in range(LANES)]))
        return row

    def to_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        order = [lane // 2 + 8 * (lane % 2) for lane in range(LANES)]
        return [shuffle(builder, vector, vector, order) for vector in vectors]

    def from_lanes(self, builder: Any, vectors: list[Any]) -> list[Any]:
        order = [2 * (column % 8) + column // 8 for column in range(LANES)]
        return [shuffle(builder, vector, vector, order) for vector in vectors]


class _Int2(_Integers):
    bits = 2

    def load(self, builder: Any, data: Any, at: Any, vectors: int) -> list[Any]:
        row = []
        for v in range(vectors):
            word = _load(builder, data, _shift(builder, at, v * 4), I32, 1)
            words = broadcast(builder, word, LANES)
            row.append(self._floats(builder, words, [2 * lane for lane in range(LANES)]))
        return row


def find_loader(bits: int, element: Any, vectors: int) -> Loader:
    """Loader for codes of ``bits`` bits, or for elements of a numba type if ``bits`` is 0."""
    if bits:
        return {8: _Fp8, 4: _Int4, 2: _Int2}[bits]()
    if element == BFLOAT16:
        return _BFloat16Pairs() if vectors > 1 else _BFloat16()
    return _Float16() if element == FLOAT16 else _Float32()


def prefetch(builder: Any, data: Any, at: Any, num_bytes: int, itemsize: int) -> None:
    """Ask for the cache lines of ``num_bytes`` bytes from ``data[at]``; bounds do not matter."""
    byte = I8.as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0"
    )
    options = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, keep close, data
    for start in range(0, num_bytes, CACHE_LINE_BYTES):
        pointer = builder.gep(data, [_shift(builder, at, start // itemsize)])
        builder.call(function, [builder.bitcast(pointer, byte), *options])
