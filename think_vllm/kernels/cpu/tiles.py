"""The inner loop of decode attention: a small matrix product with its sums in registers.

Both halves of attention are ``sums[h, x] += sum_r factors[h, r] * rows[r, x]`` over a run of
the cache: scores with rows = key channels and x = tokens, outputs with rows = tokens and
x = value channels. A tile of heads by columns keeps all its sums in vector registers while
it walks down the rows, so an element is loaded and converted once for four heads. LLVM does
not find this form from scalar loops; it is written as vector IR, which LLVM lowers to
whatever vectors the CPU has.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from think_vllm.kernels.cpu.elements import BFLOAT16, FLOAT16

#: Columns of a vector; runs are read in whole vectors.
LANES = 16
CACHE_LINE_BYTES = 64
#: 32 wide registers hold 4 heads by 4 vectors of sums; 16 narrow ones hold 4 by 1.
WIDE_REGISTERS = bool(llvm.get_host_cpu_features().get("avx512f", False))

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)


def _vector_constant(value: int) -> Any:
    return ir.Constant(ir.VectorType(I32, LANES), [value] * LANES)


def _shuffle(builder: Any, first: Any, second: Any, order: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, LANES), order)
    return builder.shuffle_vector(first, second, mask)


def _load(builder: Any, data: Any, at: Any, vector: Any, itemsize: int) -> Any:
    pointer = builder.bitcast(builder.gep(data, [at]), vector.as_pointer())
    return builder.load(pointer, align=itemsize)


def _load_row(builder: Any, element: Any, data: Any, at: Any, vectors: int) -> list[Any]:
    """Load and convert ``vectors`` vectors of a row.

    A pair of bf16 vectors costs one load and two operations if the even columns go to one
    and the odd columns to the other; `_split` and `_join` translate.
    """
    if element == BFLOAT16 and vectors > 1:
        pair = ir.VectorType(I16, 2 * LANES)
        row = []
        for v in range(0, vectors, 2):
            start = builder.add(at, ir.Constant(I64, v * LANES))
            words = _load(builder, data, start, pair, 2)
            words = builder.bitcast(words, ir.VectorType(I32, LANES))
            row.append(builder.shl(words, _vector_constant(16)))
            row.append(builder.and_(words, _vector_constant(0xFFFF0000)))
        return [builder.bitcast(words, FLOATS) for words in row]
    row = []
    for v in range(vectors):
        start = builder.add(at, ir.Constant(I64, v * LANES))
        if element == BFLOAT16:
            words = _load(builder, data, start, ir.VectorType(I16, LANES), 2)
            words = builder.zext(words, ir.VectorType(I32, LANES))
            row.append(builder.bitcast(builder.shl(words, _vector_constant(16)), FLOATS))
        elif element == FLOAT16:
            halves = _load(builder, data, start, ir.VectorType(ir.HalfType(), LANES), 2)
            row.append(builder.fpext(halves, FLOATS))
        else:
            row.append(_load(builder, data, start, FLOATS, 4))
    return row


def _prefetch(builder: Any, element: Any, data: Any, at: Any, columns: int) -> None:
    """Ask for the cache lines of ``columns`` elements. Out of bounds does no harm."""
    byte = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32]), "llvm.prefetch.p0"
    )
    options = [ir.Constant(I32, value) for value in (0, 3, 1)]  # to read, keep close, data
    for column in range(0, columns, CACHE_LINE_BYTES * 8 // element.bitwidth):
        start = builder.add(at, ir.Constant(I64, column))
        builder.call(function, [builder.bitcast(builder.gep(data, [start]), byte), *options])


def _broadcast(builder: Any, data: Any, at: Any) -> Any:
    value = builder.load(builder.gep(data, [at]))
    undefined = ir.Constant(FLOATS, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(I32, 0))
    return _shuffle(builder, one, one, [0] * LANES)


def _split(builder: Any, vectors: list[Any]) -> list[Any]:
    """Columns in order -> even and odd columns, per pair of vectors."""
    even = list(range(0, 2 * LANES, 2))
    odd = list(range(1, 2 * LANES, 2))
    return [
        _shuffle(builder, vectors[v], vectors[v + 1], order)
        for v in range(0, len(vectors), 2)
        for order in (even, odd)
    ]


def _join(builder: Any, vectors: list[Any]) -> list[Any]:
    """Even and odd columns -> columns in order, per pair of vectors."""
    order = [column // 2 + LANES * (column % 2) for column in range(2 * LANES)]
    return [
        _shuffle(builder, vectors[v], vectors[v + 1], half)
        for v in range(0, len(vectors), 2)
        for half in (order[:LANES], order[LANES:])
    ]


def _emit_tile(
    builder: Any, element: Any, num_heads: int, num_vectors: int, pointers: Any, at: Any
) -> None:
    """Emit one tile: load the sums, walk down the rows, store the sums.

    Args:
        builder: Of the function being compiled.
        element: numba type that carries the rows' elements.
        num_heads: Height of the tile.
        num_vectors: Width of the tile.
        pointers: Of sums, factors and rows.
        at: The offsets, strides and counts of ``add_products`` by name.
    """
    sums_data, factors_data, rows_data = pointers
    paired = element == BFLOAT16 and num_vectors > 1

    def shifted(value: Any, by: int, stride: Any) -> Any:
        return builder.add(value, builder.mul(stride, ir.Constant(I64, by)))

    sum_pointers, initial = [], []
    for head in range(num_heads):
        start = shifted(at["sums_at"], head, at["sums_stride"])
        offsets = [builder.add(start, ir.Constant(I64, v * LANES)) for v in range(num_vectors)]
        sum_pointers += [
            builder.bitcast(builder.gep(sums_data, [offset]), FLOATS.as_pointer())
            for offset in offsets
        ]
        vectors = [builder.load(pointer, align=4) for pointer in sum_pointers[-num_vectors:]]
        initial += _split(builder, vectors) if paired else vectors
    factor_starts = [
        shifted(at["factors_at"], head, at["factors_stride"]) for head in range(num_heads)
    ]

    before = builder.block
    body = builder.append_basic_block("tile.row")
    after = builder.append_basic_block("tile.end")
    builder.branch(body)
    builder.position_at_end(body)
    row = builder.phi(I64)
    registers = [builder.phi(FLOATS) for _ in initial]
    row_at = builder.add(at["rows_at"], builder.mul(row, at["rows_stride"]))
    ahead_at = builder.add(row_at, at["ahead"])
    _prefetch(builder, element, rows_data, ahead_at, num_vectors * LANES)
    elements = _load_row(builder, element, rows_data, row_at, num_vectors)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    updated = []
    for head in range(num_heads):
        factor = _broadcast(builder, factors_data, builder.add(factor_starts[head], row))
        for v in range(num_vectors):
            register = registers[head * num_vectors + v]
            updated.append(builder.call(fma, [factor, elements[v], register]))
    next_row = builder.add(row, ir.Constant(I64, 1))
    builder.cbranch(builder.icmp_signed("<", next_row, at["num_rows"]), body, after)
    row.add_incoming(ir.Constant(I64, 0), before)
    row.add_incoming(next_row, body)
    for register, start, end in zip(registers, initial, updated, strict=True):
        register.add_incoming(start, before)
        register.add_incoming(end, body)

    builder.position_at_end(after)
    results = _join(builder, updated) if paired else updated
    for pointer, vector in zip(sum_pointers, results, strict=True):
        builder.store(vector, pointer, align=4)


@intrinsic(prefer_literal=True)
def _add_tile(
    typingctx: Any,
    heads: Any,
    vectors: Any,
    sums: Any,
    sums_at: Any,
    sums_stride: Any,
    factors: Any,
    factors_at: Any,
    factors_stride: Any,
    rows: Any,
    rows_at: Any,
    rows_stride: Any,
    num_rows: Any,
    ahead: Any,
) -> Any:
    """``add_products`` for literally ``heads`` heads and ``vectors * LANES`` columns."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        pointers = [
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (2, 5, 8)
        ]
        names = {
            "sums_at": 3,
            "sums_stride": 4,
            "factors_at": 6,
            "factors_stride": 7,
            "rows_at": 9,
            "rows_stride": 10,
            "num_rows": 11,
            "ahead": 12,
        }
        at = {name: args[i] for name, i in names.items()}
        shape = (heads.literal_value, vectors.literal_value)
        _emit_tile(builder, signature.args[8].dtype, *shape, pointers, at)

    i64 = types.int64
    signature = types.void(
        heads, vectors, sums, i64, i64, factors, i64, i64, rows, i64, i64, i64, i64
    )
    return signature, codegen


def _make_stripe(vectors: int) -> Any:
    """Build ``add_products`` for ``vectors * LANES`` columns and any number of heads."""

    @njit
    def add_stripe(
        sums: Any,
        sums_at: int,
        sums_stride: int,
        factors: Any,
        factors_at: int,
        factors_stride: int,
        rows: Any,
        rows_at: int,
        rows_stride: int,
        num_rows: int,
        heads: int,
        ahead: int,
    ) -> None:
        # fmt: off
        head = 0
        while head < heads:
            s, f = sums_at + head * sums_stride, factors_at + head * factors_stride
            if heads - head >= 4:
                _add_tile(4, vectors, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 4
            elif heads - head >= 2:
                _add_tile(2, vectors, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 2
            else:
                _add_tile(1, vectors, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 1
        # fmt: on

    return add_stripe


_add_stripe_4, _add_stripe_2, _add_stripe_1 = _make_stripe(4), _make_stripe(2), _make_stripe(1)


@njit
def add_products(
    sums: Any,
    sums_at: int,
    sums_stride: int,
    factors: Any,
    factors_at: int,
    factors_stride: int,
    rows: Any,
    rows_at: int,
    rows_stride: int,
    num_rows: int,
    heads: int,
    columns: int,
    ahead: int,
) -> None:
    """Add ``sums[h, x] += sum_r factors[h, r] * rows[r, x]``.

    Args:
        sums: Flat float32; holds ``[heads, columns]``.
        sums_at: Offset of its first element.
        sums_stride: Elements between its rows.
        factors: Flat float32; holds ``[heads, num_rows]``.
        factors_at: Offset of its first element.
        factors_stride: Elements between its rows.
        rows: Flat elements; holds ``[num_rows, columns]``.
        rows_at: Offset of its first element.
        rows_stride: Elements between its rows.
        num_rows: At least 1.
        heads: Query heads of the group.
        columns: A multiple of ``LANES``.
        ahead: Distance in elements to what is read next, which is fetched meanwhile: blocks
            are too short, and two halves of a row too far apart, for the CPU to foresee it.
    """
    # fmt: off
    x = 0
    while x < columns:
        if WIDE_REGISTERS and columns - x >= 4 * LANES:
            _add_stripe_4(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                          rows, rows_at + x, rows_stride, num_rows, heads, ahead)
            x += 4 * LANES
        elif WIDE_REGISTERS and columns - x >= 2 * LANES:
            _add_stripe_2(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                          rows, rows_at + x, rows_stride, num_rows, heads, ahead)
            x += 2 * LANES
        else:
            _add_stripe_1(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                          rows, rows_at + x, rows_stride, num_rows, heads, ahead)
            x += LANES
    # fmt: on
