"""The loop of attention over static blocks.

Rows are query heads of one KV head, of one token or of several, and a
running softmax is carried along. A query's own token is in the blocks, pruned and quantized, so
there is a causal mask here. Nothing is gathered or scattered for a block: channels are the layer's.
"""

import triton
import triton.language as tl

from csrc_triton.blocks import find_run
from csrc_triton.dots import dot
from csrc_triton.matrices import as_elements, load_codes
from csrc_triton.softmax import cap_scores
from csrc_triton.static_blocks import kept_channels


@triton.jit
def weigh(scores, live, top, total, scale, cap, CAPPED: tl.constexpr):
    """One step of the running softmax: weights, what older sums are worth, maximum, sum."""
    scores = scores * scale
    if CAPPED:
        scores = cap_scores(scores, cap)
    scores = tl.where(live, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    # A split can start with tokens of which none is live.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - base[:, None])
    older = tl.exp(top - base)
    return weights, older, highest, total * older + tl.sum(weights, axis=1)


@triton.jit
def gather_query(
    query_at, row_mask, order_ptr, kv_head, C: tl.constexpr, C_PAD: tl.constexpr, D: tl.constexpr
):
    """Kept key channels of queries ``[ROWS, C_PAD]``, 0 behind them and in rows without one.

    ``query_at`` ``[ROWS, 1]`` points to the first channel of each row's query.
    """
    index = tl.arange(0, C_PAD)
    channel = kept_channels(order_ptr, kv_head, index, C, D)
    mask = row_mask[:, None] & (index < C)[None, :]
    return tl.load(query_at + channel[None, :], mask=mask, other=0.0)


@triton.jit
def attend_static(
    top, total, sums, query, position, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride,
    TILE: tl.constexpr, CAPPED: tl.constexpr, D: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    V: tl.constexpr, C_PAD: tl.constexpr, V_PAD: tl.constexpr, BITS: tl.constexpr,
    KEYS: tl.constexpr, KEY_ROW: tl.constexpr, VALUE_ROW: tl.constexpr, KEY_SCALES: tl.constexpr,
    VALUE_SCALES: tl.constexpr, DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``begin .. end - 1`` of a request; ``begin`` is a multiple of TILE.

    ``query`` is of ``gather_query``. A row's query is at ``position`` ``[ROWS]`` and sees nothing
    behind it, nor from ``end`` on. ``sums`` ``[ROWS, V_PAD]`` are over kept channels. ``table``
    points to the request's row of the block table; strides are bytes; the constants are those of
    ``static_blocks.static_constants``.
    """
    kept = tl.arange(0, C_PAD)
    offset = tl.arange(0, TILE)
    TILES: tl.constexpr = N // TILE
    for tile in range(begin // TILE, tl.cdiv(end, TILE)):
        page = tl.load(table + tile // TILES)
        run = find_run(kv_ptr, page, kv_head, block_stride, head_stride)
        # Triton sees that this is a multiple of TILE, as it would not of a remainder.
        start = tile % TILES * TILE
        token = tile * TILE + offset
        live = token < end
        # What lies behind the last token is read, and left out below.
        keys = load_codes(run + KEYS, kept, kept < C, start, TILE, TILE, KEY_ROW, BITS, DTYPE)
        scores = dot(query, keys, DTYPE, DOT, PRECISION)
        if BITS == 8:
            at = as_elements(run + KEY_SCALES, tl.float32) + start + offset
            scores = scores * tl.load(at, mask=live, other=0.0)[None, :]
        seen = live[None, :] & (token[None, :] <= position[:, None])
        weights, older, top, total = weigh(scores, seen, top, total, scale, cap, CAPPED)
        # Weights of tokens that no query sees are 0, which leaves a NaN a NaN.
        values = load_codes(run, start + offset, live, 0, V_PAD, V, VALUE_ROW, BITS, DTYPE)
        if BITS == 8:
            # Not into the weights: small ones would lose their digits in float16.
            at = as_elements(run + VALUE_SCALES, tl.float32) + start + offset
            values = values * tl.load(at, mask=live, other=0.0)[:, None]
        sums = sums * older[:, None] + dot(weights, values, DTYPE, DOT, PRECISION)
    return top, total, sums
