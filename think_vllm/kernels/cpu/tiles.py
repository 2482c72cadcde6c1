"""The inner loop of decode attention: a small matrix product with its sums in registers.

Both halves of attention are ``sums[h, x] += sum_r factors[h, r] * rows[r, x]`` over a run of
the cache: scores with rows = key channels and x = tokens, outputs with rows = tokens and
x = value channels. A tile of heads by columns keeps all its sums in vector registers while
it walks down the rows, so an element is loaded and converted once for four heads. LLVM does
not find this form from scalar loops, so it is written as vector IR.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from think_vllm.kernels.cpu.compiling import named
from think_vllm.kernels.cpu.vectors import (
    FLOATS,
    I64,
    LANES,
    WIDE_REGISTERS,
    broadcast,
    find_loader,
    prefetch,
)


def _emit_tile(
    builder: Any,
    element: Any,
    bits: int,
    num_heads: int,
    num_vectors: int,
    pointers: list[Any],
    at: dict[str, Any],
) -> None:
    """Emit the loop over rows with ``num_heads * num_vectors`` sums in registers.

    The loop body is written before LLVM sees it, because a tile is worth nothing unless all
    its sums are registers and all its loads are vectors.
    """
    sums_data, factors_data, rows_data = pointers
    loader = find_loader(bits, element, num_vectors)
    itemsize = element.bitwidth // 8

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
        initial += loader.to_lanes(builder, vectors)
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
    prefetch(builder, rows_data, ahead_at, num_vectors * LANES * loader.bits // 8, itemsize)
    elements = loader.load(builder, rows_data, row_at, num_vectors)
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
    )
    updated = []
    for head in range(num_heads):
        value = builder.load(builder.gep(factors_data, [builder.add(factor_starts[head], row)]))
        factor = broadcast(builder, value, LANES)
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
    for pointer, vector in zip(sum_pointers, loader.from_lanes(builder, updated), strict=True):
        builder.store(vector, pointer, align=4)


@intrinsic(prefer_literal=True)
def _add_tile(
    typingctx, heads, vectors, bits, sums, sums_at, sums_stride, factors, factors_at,
    factors_stride, rows, rows_at, rows_stride, num_rows, ahead,
):  # fmt: skip
    """Products for literally ``heads`` heads, ``vectors * LANES`` columns, codes of ``bits``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        pointers = [
            context.make_array(signature.args[i])(context, builder, args[i]).data for i in (3, 6, 9)
        ]
        names = "sums_at sums_stride factors_at factors_stride rows_at rows_stride num_rows ahead"
        places = (4, 5, 7, 8, 10, 11, 12, 13)
        at = {name: args[i] for name, i in zip(names.split(), places, strict=True)}
        shape = (bits.literal_value, heads.literal_value, vectors.literal_value)
        _emit_tile(builder, signature.args[9].dtype, *shape, pointers, at)

    i64 = types.int64
    signature = types.void(
        heads, vectors, bits, sums, i64, i64, factors, i64, i64, rows, i64, i64, i64, i64
    )
    return signature, codegen


def _make_stripe(vectors: int, bits: int) -> Any:
    """Build products for ``vectors * LANES`` columns and any number of heads."""

    @njit
    @named(f"{vectors}_{bits}")
    def add_stripe(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride, rows, rows_at, rows_stride,
        num_rows, heads, ahead,
    ):  # fmt: skip
        # fmt: off
        head = 0
        while head < heads:
            s, f = sums_at + head * sums_stride, factors_at + head * factors_stride
            if heads - head >= 4:
                _add_tile(4, vectors, bits, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 4
            elif heads - head >= 2:
                _add_tile(2, vectors, bits, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 2
            else:
                _add_tile(1, vectors, bits, sums, s, sums_stride, factors, f, factors_stride,
                          rows, rows_at, rows_stride, num_rows, ahead)
                head += 1
        # fmt: on

    return add_stripe


def _make_products(bits: int) -> Callable[..., None]:
    """Build ``add_products`` for codes of ``bits`` bits, 0 for elements of the cache's dtype."""
    stripe_4, stripe_2, stripe_1 = (_make_stripe(vectors, bits) for vectors in (4, 2, 1))
    #: What a vector takes in a row: elements, or bytes of codes.
    step = LANES * bits // 8 if bits else LANES

    @njit
    @named(bits)
    def add_products(
        sums, sums_at, sums_stride, factors, factors_at, factors_stride, rows, rows_at, rows_stride,
        num_rows, heads, columns, ahead,
    ):  # fmt: skip
        # fmt: off
        # 32 wide registers hold 4 heads by 4 vectors of sums; 16 narrow ones hold 4 by 1.
        x = 0
        while x < columns:
            if WIDE_REGISTERS and columns - x >= 4 * LANES:
                stripe_4(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                         rows, rows_at, rows_stride, num_rows, heads, ahead)
                x += 4 * LANES
                rows_at += 4 * step
            elif WIDE_REGISTERS and columns - x >= 2 * LANES:
                stripe_2(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                         rows, rows_at, rows_stride, num_rows, heads, ahead)
                x += 2 * LANES
                rows_at += 2 * step
            else:
                stripe_1(sums, sums_at + x, sums_stride, factors, factors_at, factors_stride,
                         rows, rows_at, rows_stride, num_rows, heads, ahead)
                x += LANES
                rows_at += step
        # fmt: on

    products: Callable[..., None] = add_products
    return products


# ``add_*(sums, sums_at, sums_stride, factors, factors_at, factors_stride, rows, rows_at,
# rows_stride, num_rows, heads, columns, ahead)`` adds ``sums[h, x] += sum_r factors[h, r] *
# rows[r, x]`` for ``heads`` heads and ``columns`` columns, a multiple of LANES. ``*_at`` are
# offsets of first elements, ``*_stride`` distances between rows; ``rows`` counts elements of the
# cache's dtype, or bytes. ``ahead`` is the distance to what is read next, which is fetched
# meanwhile: blocks are too short, and two halves of a row too far apart, for the CPU to foresee.

#: Rows of elements of the cache's dtype.
add_products = _make_products(0)
#: Rows of e4m3 codes, which count 1/256 of their value.
add_fp8 = _make_products(8)
#: Rows of 4-bit codes, which count ``(code - 7.5) / 16``.
add_int4 = _make_products(4)
#: Rows of 2-bit codes, which count ``(code - 1.5) / 4``.
add_int2 = _make_products(2)
