"""How kernels are declared and launched, so that none is compiled while requests wait.

Triton compiles a kernel again for integers that are 1 or multiples of 16, and for pointers that are
not. Which these are depends on the batch, so kernels turn that off for integers. What they need to
know for wide loads, that strides are multiples of 16, lies in the code: strides come as so many
times 16, which launchers check and kernels multiply out (``whole_stride``).
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

#: Elements, or bytes, that strides are multiples of.
STRIDE_MULTIPLE = 16
_MULTIPLE = tl.constexpr(STRIDE_MULTIPLE)


def kernel(*, unaligned: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Declare a kernel of which there is one binary for each set of compile-time numbers.

    Run-time arguments that are no pointers must not have names that end with ``_ptr``.

    Args:
        unaligned: Pointers that need not be multiples of 16 bytes: to small tensors, or slices.
    """

    def declare(function: Callable[..., Any]) -> Any:
        numbers = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.annotation is not tl.constexpr and not name.endswith("_ptr")
        ]
        return triton.jit(
            function, do_not_specialize=numbers, do_not_specialize_on_alignment=list(unaligned)
        )

    return declare


def row_strides(who: str, name: str, tensor: torch.Tensor) -> tuple[int, int]:
    """Strides of dims 0 and 1 of ``[rows, heads, channels]``, in units of ``STRIDE_MULTIPLE``.

    Raises:
        ValueError: If they are no multiples of ``STRIDE_MULTIPLE``.
    """
    # The stride of a dim of one element means nothing.
    strides = [
        stride if size > 1 else STRIDE_MULTIPLE
        for stride, size in zip(tensor.stride()[:2], tensor.shape[:2], strict=True)
    ]
    if any(stride % STRIDE_MULTIPLE for stride in strides):
        raise ValueError(
            f"{who}: {name} has strides {tensor.stride()}; kernels load {STRIDE_MULTIPLE} elements "
            f"at once, so those of dims 0 and 1 must be multiples of {STRIDE_MULTIPLE}"
        )
    return strides[0] // STRIDE_MULTIPLE, strides[1] // STRIDE_MULTIPLE


class CompileTime:
    """Base of frozen dataclasses that kernels take as one compile-time argument.

    Where kernels are compiled, their numbers become Triton's constants, which is what its functions
    want; its interpreter wants plain ones. To make and compare them at each launch would slow it
    down, so keep one for each plan (``functools.cache``), and let it equal no other (``eq=False``).
    Triton tells binaries apart by what they print.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and not triton.knobs.runtime.interpret:
                object.__setattr__(self, name, tl.constexpr(value))


@triton.jit
def whole_stride(stride):
    """A stride, of what the launcher made of it."""
    return stride * _MULTIPLE
