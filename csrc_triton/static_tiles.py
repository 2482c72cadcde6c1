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
def gather_query(query_at, row_mask, order_ptr, kv_head, L: tl.constexpr):
    """Kept key channels of queries ``[ROWS, C_PAD]``, 0 behind them and in rows without one.

    ``query_at`` ``[ROWS, 1]`` points to the first channel of each row's query.
    """
    index = tl.arange(0, L.C_PAD)
    channel = kept_channels(order_ptr, kv_head, index, L.C, L.D)
    mask = row_mask[:, None] & (index < L.C)[None, :]
    return tl.load(query_at + channel[None, :], mask=mask, other=0.0)


@triton.jit
def attend_static(
    top, total, sums, query, position, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride,
    TILE: tl.constexpr, CAPPED: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``begin .. end - 1`` of a request; ``begin`` is a multiple of TILE.

    ``query`` is of ``gather_query``. A row's query is at ``position`` ``[ROWS]`` and sees nothing
    behind it, nor from ``end`` on. ``sums`` ``[ROWS, V_PAD]`` are over kept channels. ``table``
    points to the request's row of the block table; strides are bytes.
    """
    kept = tl.arange(0, L.C_PAD)
    offset = tl.arange(0, TILE)
    TILES: tl.constexpr = L.N // TILE
    for tile in range(begin // TILE, tl.cdiv(end, TILE)):
        page = tl.load(table + tile // TILES)
        run = find_run(kv_ptr, page, kv_head, block_stride, head_stride)
        # Triton sees that this is a multiple of TILE, as it would not of a remainder.
        start = tile % TILES * TILE
        token = tile * TILE + offset
        live = token < end
        # What lies behind the last token is read, and left out below.
        keys = load_codes(
            run + L.KEYS, kept, kept < L.C, start, TILE, TILE, L.KEY_ROW, L.BITS, L.DTYPE
        )
        scores = dot(query, keys, L.DTYPE, L.DOT)
        if L.BITS == 8:
            at = as_elements(run + L.KEY_SCALES, tl.float32) + start + offset
            scores = scores * tl.load(at, mask=live, other=0.0)[None, :]
        seen = live[None, :] & (token[None, :] <= position[:, None])
        weights, older, top, total = weigh(scores, seen, top, total, scale, cap, CAPPED)
        # Weights of tokens that no query sees are 0, which leaves a NaN a NaN.
        values = load_codes(
            run, start + offset, live, 0, L.V_PAD, L.V, L.VALUE_ROW, L.BITS, L.DTYPE
        )
        if L.BITS == 8:
            # Not into the weights: small ones would lose their digits in float16.
            at = as_elements(run + L.VALUE_SCALES, tl.float32) + start + offset
            values = values * tl.load(at, mask=live, other=0.0)[:, None]
        sums = sums * older[:, None] + dot(weights, values, L.DTYPE, L.DOT)
    return top, total, sums
