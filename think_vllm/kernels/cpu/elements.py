"""Cache elements as numba sees them: which array stands for which dtype, loads and stores.

numba has no bfloat16 and no float16 on the CPU, so a cache is passed as a flat array whose
numpy dtype names the element: uint16 is bfloat16, int16 is float16, float32 is itself.
The intrinsics below turn the bits into float32 in ways that LLVM vectorizes.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: The integer (or float) that carries an element's bits into numba.
CARRIERS: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.uint16,
    torch.float16: torch.int16,
    torch.float32: torch.float32,
}

BFLOAT16 = types.uint16
FLOAT16 = types.int16

Array = npt.NDArray[Any]


def flat_elements(tensor: torch.Tensor) -> Array:
    """View a tensor's memory as one flat array, for int64 offsets from its first element.

    Args:
        tensor: Any CPU tensor with positive strides.

    Returns:
        ``[extent]`` array that shares the tensor's memory, of the carrier dtype if there is one.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,))
    return flat.view(CARRIERS.get(tensor.dtype, tensor.dtype)).numpy()


def flat_indices(values: Any) -> npt.NDArray[np.int32]:
    """Copy indices into a fresh int32 array, so that every call has the same numba types."""
    return np.asarray(values).astype(np.int32)


@intrinsic
def element_to_float32(typingctx, bits):
    """``element_to_float32(bits)``: the float32 value of one element."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if signature.args[0] == BFLOAT16:
            wide = builder.zext(args[0], ir.IntType(32))
            wide = builder.shl(wide, ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if signature.args[0] == FLOAT16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())
        return args[0]

    return types.float32(bits), codegen


@intrinsic
def float32_to_element(typingctx, value, like):
    """``float32_to_element(value, like)``: the element nearest to a float32, ties to even.

    ``like`` is any element of the wanted type; its value is not used.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, element = args[0], signature.args[1]
        if element == FLOAT16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        if element != BFLOAT16:
            return value
        i32 = ir.IntType(32)
        sixteen = ir.Constant(i32, 16)
        bits = builder.bitcast(value, i32)
        odd = builder.and_(builder.lshr(bits, sixteen), ir.Constant(i32, 1))
        rounded = builder.add(builder.add(bits, ir.Constant(i32, 0x7FFF)), odd)
        quiet_nan = ir.Constant(i32, 0x7FC00000)
        rounded = builder.select(builder.fcmp_unordered("uno", value, value), quiet_nan, rounded)
        return builder.trunc(builder.lshr(rounded, sixteen), ir.IntType(16))

    return like(types.float32, like), codegen


@intrinsic
def bits_to_float32(typingctx, bits):
    """``bits_to_float32(bits)``: the float32 that 32 bits spell."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def float32_to_bits(typingctx, value):
    """``float32_to_bits(value)``: the 32 bits that spell a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def copy_elements(typingctx, target, target_at, source, source_at, count):
    """``copy_elements(target, target_at, source, source_at, count)``: memcpy between arrays.

    A loop would be slow: numba allows for negative indices, which keeps LLVM from seeing that
    the elements are neighbours.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> None:
        pointers = []
        for array, at in ((0, 1), (2, 3)):
            array_type = signature.args[array]
            data = context.make_array(array_type)(context, builder, args[array]).data
            pointers.append(builder.gep(data, [args[at]]))
        itemsize = context.get_abi_sizeof(context.get_data_type(signature.args[0].dtype))
        cgutils.raw_memcpy(builder, *pointers, args[4], itemsize)

    if target.dtype != source.dtype:
        return None
    i64 = types.int64
    return types.void(target, i64, source, i64, i64), codegen
