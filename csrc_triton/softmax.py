"""One step of a running softmax over tiles of scores, tokens by queries."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
BOOST = tl.constexpr(8.0)


@triton.jit
def cap_scores(scores, cap):
    """``cap * tanh(scores / cap)``, through exp."""
    # Both libdevice's errors and this one's are far below the cache's.
    decay = tl.exp(-2.0 * tl.abs(scores / cap))
    capped = cap * (1.0 - decay) / (1.0 + decay)
    return tl.where(scores > 0, capped, -capped)


@triton.jit
def weigh(scores, live, top, total, scale, cap, CAPPED: tl.constexpr):
    """One step of the running softmax: weights, what older sums are worth, maximum, sum.

    Args:
        scores: float32 ``[tokens, QUERIES]``.
        live: Which of them count.
        top: Of earlier scores, times log2(e).
        total: Of earlier weights.
        scale: Factor on the scores of each query, float32 ``[QUERIES]``, positive.
        cap: See ``CAPPED``.
        CAPPED: Whether scores become ``cap * tanh(score / cap)``.
    """
    if CAPPED:
        scores, scale = cap_scores(scores * scale[None, :], cap), LOG2E
    else:
        scale = scale * LOG2E
    scores = tl.where(live, scores, float("-inf"))
    # Scaled after the maximum, and then in one operation with the subtraction.
    highest = tl.maximum(top, tl.max(scores, axis=0) * scale)
    # A split can start with tokens of which none is live.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    if CAPPED:
        weights = tl.exp2(scores * scale - (base - BOOST)[None, :])
    else:
        weights = tl.exp2(scores * scale[None, :] - (base - BOOST)[None, :])
    older = tl.exp2(top - base)
    return weights, older, highest, total * older + tl.sum(weights, axis=0)
