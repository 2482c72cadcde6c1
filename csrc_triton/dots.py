"""Products of tiles on tensor cores."""

from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.blocks import element_type


def dot_constants(dtype: torch.dtype) -> dict[str, Any]:
    """What ``dot`` needs to know about a cache dtype.

    DTYPE is the dtype that operands are rounded to, DOT the one that they are multiplied in. They
    differ for bfloat16 in Triton's interpreter, which multiplies its bits as if they were
    integers. float32 caches are there for comparisons, so their products keep float32's precision.
    """
    element = element_type(dtype)
    interpreted = triton.knobs.runtime.interpret
    return {
        "DTYPE": element,
        "DOT": tl.float32 if interpreted and dtype == torch.bfloat16 else element,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }


@triton.jit
def dot(a, b, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` in float32, of operands rounded to the cache's dtype."""
    return tl.dot(a.to(DTYPE).to(DOT), b.to(DTYPE).to(DOT), input_precision=PRECISION)
