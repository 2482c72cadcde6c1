"""Products of tiles on tensor cores."""

from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.blocks import element_type


def dot_type(dtype: torch.dtype) -> Any:
    """The dtype in which operands of a cache's dtype are multiplied.

    Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
    """
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted and dtype == torch.bfloat16 else element_type(dtype)


@triton.jit
def dot(a, b, DTYPE: tl.constexpr, DOT: tl.constexpr):
    """``a @ b`` in float32, of operands rounded to DTYPE and multiplied in DOT.

    float32 caches are there for comparisons, so their products keep float32's precision.
    """
    PRECISION: tl.constexpr = "ieee" if DTYPE.is_fp32() else "tf32"
    return tl.dot(a.to(DTYPE).to(DOT), b.to(DTYPE).to(DOT), input_precision=PRECISION)
