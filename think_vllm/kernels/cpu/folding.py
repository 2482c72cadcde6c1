"""Folding scales and zeros into factors: short loops over whole vectors, as vector IR.

Rows are too few (48 to 128) for LLVM's own vectorizer, which unrolls to 64 and more.
Arrays that are written have room for a multiple of ``LANES``; what lies behind the last row there
is zero in ``steps`` and ``bases``, and of no meaning in ``folded``.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from think_vllm.kernels.cpu.vectors import FLOATS, I32, I64, LANES, broadcast, constants

_HALVES = ir.VectorType(ir.HalfType(), LANES)
_BITS = ir.VectorType(ir.IntType(1), LANES)


def _loop(
    builder: Any, count: Any, carried: list[Any], body: Callable[..., list[Any]]
) -> list[Any]:
    """Emit ``for x in range(0, count, LANES): carried = body(x, carried)`` with count > 0."""
    before = builder.block
    inside, after = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(inside)
    builder.position_at_end(inside)
    x = builder.phi(I64)
    x.add_incoming(ir.Constant(I64, 0), before)
    phis = [builder.phi(value.type) for value in carried]
    results = body(x, phis)
    for phi, start, end in zip(phis, carried, results, strict=True):
        phi.add_incoming(start, before)
        phi.add_incoming(end, inside)
    following = builder.add(x, ir.Constant(I64, LANES))
    x.add_incoming(following, inside)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return results


def _vector_pointer(builder: Any, data: Any, start: Any, x: Any, kind: Any) -> Any:
    pointer = builder.gep(data, [builder.add(start, x)])
    return builder.bitcast(pointer, kind.as_pointer())


def _data(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


@intrinsic
def load_steps(typingctx, halves, scales_at, zeros_at, count, unit, middle, steps, bases):
    """``load_steps(halves, scales_at, zeros_at, count, unit, middle, steps, bases)``.

    Writes ``steps = scale * unit`` and ``bases = zero + scale * middle`` for ``count`` rows.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        _, scales_at, zeros_at, count, unit, middle, _, _ = args
        halves, steps, bases = (
            _data(context, builder, signature.args[i], args[i]) for i in (0, 6, 7)
        )
        load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_HALVES, [_HALVES.as_pointer(), I32, _BITS, _HALVES]),
            f"llvm.masked.load.v{LANES}f16.p0",
        )
        lanes = constants(I64, list(range(LANES)))
        nothing = ir.Constant(_HALVES, [0.0] * LANES)
        units, zero = broadcast(builder, unit, LANES), ir.Constant(I64, 0)
        middles = broadcast(builder, middle, LANES)

        def body(x: Any, _: list[Any]) -> list[Any]:
            left = broadcast(builder, builder.sub(count, x), LANES)
            mask = builder.icmp_signed("<", lanes, left)
            found = []
            for start in (scales_at, zeros_at):
                pointer = _vector_pointer(builder, halves, start, x, _HALVES)
                vector = builder.call(load, [pointer, ir.Constant(I32, 2), mask, nothing])
                found.append(builder.fpext(vector, FLOATS))
            step = builder.fmul(found[0], units)
            base = builder.fadd(found[1], builder.fmul(found[0], middles))
            for target, vector in ((steps, step), (bases, base)):
                pointer = _vector_pointer(builder, target, zero, x, FLOATS)
                builder.store(vector, pointer, align=4)
            return []

        _loop(builder, count, [], body)

    i64, f32 = types.int64, types.float32
    return types.void(halves, i64, i64, i64, f32, f32, steps, bases), codegen


@intrinsic
def fold(typingctx, factors, factors_at, steps, bases, count, folded, folded_at):
    """``fold(factors, factors_at, steps, bases, count, folded, folded_at)``.

    Writes ``folded = factors * steps`` and returns ``sum(factors * bases)``. Reads factors up to
    a multiple of ``LANES``; those behind the last row must be finite.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, factors_at, _, _, count, _, folded_at = args
        factors, steps, bases, folded = (
            _data(context, builder, signature.args[i], args[i]) for i in (0, 2, 3, 5)
        )
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fmuladd.v{LANES}f32"
        )
        reduce = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS]),
            f"llvm.vector.reduce.fadd.v{LANES}f32",
        )
        zero = ir.Constant(I64, 0)

        def body(x: Any, carried: list[Any]) -> list[Any]:
            given, step, base = (
                builder.load(_vector_pointer(builder, data, start, x, FLOATS), align=4)
                for data, start in ((factors, factors_at), (steps, zero), (bases, zero))
            )
            target = _vector_pointer(builder, folded, folded_at, x, FLOATS)
            builder.store(builder.fmul(given, step), target, align=4)
            return [builder.call(fma, [given, base, carried[0]])]

        start = ir.Constant(FLOATS, [0.0] * LANES)
        (total,) = _loop(builder, count, [start], body)
        return builder.call(
            reduce, [ir.Constant(ir.FloatType(), 0.0), total], fastmath=("reassoc",)
        )

    i64 = types.int64
    return types.float32(factors, i64, steps, bases, i64, folded, i64), codegen


@intrinsic
def add_constant(typingctx, sums, sums_at, count, value):
    """``add_constant(sums, sums_at, count, value)``: for ``count`` sums, a multiple of LANES."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        _, sums_at, count, value = args
        sums = _data(context, builder, signature.args[0], args[0])
        values = broadcast(builder, value, LANES)

        def body(x: Any, _: list[Any]) -> list[Any]:
            pointer = _vector_pointer(builder, sums, sums_at, x, FLOATS)
            total = builder.fadd(builder.load(pointer, align=4), values)
            builder.store(total, pointer, align=4)
            return []

        _loop(builder, count, [], body)

    i64 = types.int64
    return types.void(sums, i64, i64, types.float32), codegen
