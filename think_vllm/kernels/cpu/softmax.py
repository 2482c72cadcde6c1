"""Softmax pieces over rows of float32 scores, in loops that LLVM vectorizes.

Rows are slices that start at 0: numba allows for negative indices, and an offset that might be
one keeps LLVM from seeing that the elements are neighbours (ten times slower).
No fast-math flag here lets LLVM assume that NaN or infinity cannot occur.
"""

import math

import numpy as np
from numba import njit

from think_vllm.kernels.cpu.elements import bits_to_float32, float32_to_bits

#: Scores of padding: lower than any score, and finite so that differences are no NaN.
LOWEST = np.float32(-3.4e38)
LOG2_E = np.float32(math.log2(math.e))
#: 2 ** f on [-0.5, 0.5] as its Taylor series; the first term left out is below 1e-8.
EXP2_TERMS = tuple(np.float32(math.log(2) ** k / math.factorial(k)) for k in range(8))
E0, E1, E2, E3, E4, E5, E6, E7 = EXP2_TERMS
REASSOCIATE = {"reassoc", "contract", "nsz"}


@njit(fastmath=REASSOCIATE)
def exp(x):
    """``e ** x`` in float32 for x <= 88; below 2 ** -126 it is 0.

    The relative error is below 2e-7, plus 1e-7 times ``|x|``: that of ``x * LOG2_E``.
    """
    power = x * LOG2_E
    power = np.float32(-127.0) if power < np.float32(-127.0) else power
    whole = np.floor(power + np.float32(0.5))
    f = power - whole
    series = E6 + f * E7
    series = E5 + f * series
    series = E4 + f * series
    series = E3 + f * series
    series = E2 + f * series
    series = E1 + f * series
    series = E0 + f * series
    # 2 ** whole has exponent bits whole + 127, and is 0 for whole = -127.
    return series * bits_to_float32((np.int32(whole) + np.int32(127)) << np.int32(23))


@njit
def row_max(scores):
    """Largest score of a row, NaN if one is NaN.

    Compares the bits as integers that sort like the floats (apart from -0 < +0): unlike
    float comparisons LLVM vectorizes those without being told that there is no NaN.
    """
    top = np.int32(-0x80000000)
    for x in range(len(scores)):
        bits = float32_to_bits(scores[x])
        ordered = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
        top = max(top, ordered)
    return bits_to_float32(np.int32(top ^ ((top >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit(fastmath=REASSOCIATE)
def exp_row(scores, top):
    """Replace scores by ``exp(score - top)`` and return their sum."""
    total = np.float32(0.0)
    for x in range(len(scores)):
        weight = exp(scores[x] - top)
        scores[x] = weight
        total += weight
    return total


@njit(fastmath=REASSOCIATE)
def cap_row(scores, cap):
    """Replace scores by ``cap * tanh(score / cap)``, with ``tanh`` in terms of ``exp``."""
    for x in range(len(scores)):
        ratio = abs(scores[x] / cap)
        decay = exp(np.float32(-2.0) * ratio)
        tanh = (np.float32(1.0) - decay) / (np.float32(1.0) + decay)
        capped = cap * tanh
        scores[x] = capped if scores[x] > np.float32(0.0) else -capped
