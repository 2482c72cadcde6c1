"""The loops of attention: query rows over thin blocks, and over dense ones.

Rows are query heads of one KV head, of one token or of several, so that every key and value is
read once for all of them. Both loops carry a running softmax: ``top`` and ``total`` [ROWS] and
``sums`` [ROWS, D_PAD]. Thin blocks leave the channels of ``sums`` in byte order (``column_of``),
unless some were pruned: sums over a block's kept channels are scattered, in order.
"""

import triton
import triton.language as tl

from csrc_triton.blocks import dense_rows, find_run
from csrc_triton.dots import dot
from csrc_triton.matrices import (
    as_elements,
    column_of,
    load_codes,
    load_halves,
    load_scale,
    load_values,
    parts_of,
    scatter_channels,
)


@triton.jit
def weigh(scores, live, top, total, scale, cap, CAPPED: tl.constexpr):
    """One step of the running softmax: weights, what older sums are worth, maximum, sum."""
    scores = scores * scale
    if CAPPED:
        # tanh through exp; both libdevice's and this one's errors are far below the cache's.
        decay = tl.exp(-2.0 * tl.abs(scores / cap))
        capped = cap * (1.0 - decay) / (1.0 + decay)
        scores = tl.where(scores > 0, capped, -capped)
    scores = tl.where(live, scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    # A split can start with tokens of which none is live.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp(scores - base[:, None])
    older = tl.exp(top - base)
    return weights, older, highest, total * older + tl.sum(weights, axis=1)


@triton.jit
def attend_thin(
    top, total, sums, query_at, row_mask, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride,
    C_PAD: tl.constexpr, V_PAD: tl.constexpr, D_PAD: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, THIN: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr,
    KEY_ROW: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_ROW: tl.constexpr, VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr, TABLE: tl.constexpr, V: tl.constexpr, VALUE_TABLE: tl.constexpr,
):  # fmt: skip
    """Attend to thin blocks ``begin .. end - 1`` of a request, counted from its first one.

    Nobody's own token is thin, so there is no causal mask.

    ``query_at`` ``[ROWS, 1]`` points to the first channel of each row's query, ``row_mask`` says
    which rows are queries, ``table`` points to the request's row of the block table. Strides are
    bytes; the constants are those of ``blocks.LAYOUT_NAMES`` and ``dots.dot_constants``.
    """
    kept = tl.arange(0, C_PAD)
    kept_mask = kept < C
    KEY_PARTS: tl.constexpr = parts_of(KEY_BITS)
    for block in range(begin, end):
        span, k = block // THIN, block % THIN
        page = tl.load(table + span * SPAN + k)
        run = find_run(kv_ptr, page, kv_head, block_stride, head_stride)
        channel = kept
        if TABLE >= 0:
            channel = tl.load(run + TABLE + kept, mask=kept_mask, other=0).to(tl.int32)
        gathered = tl.load(
            query_at + channel[None, :], mask=row_mask[:, None] & kept_mask[None, :], other=0.0
        )
        factor = scale
        if KEY_BITS == 8:
            factor = scale * load_scale(run + KEY_SCALES)
        count = tl.minimum(T, SPAN * N - k * T)
        if VALUE_TABLE >= 0:
            kept_sums = tl.zeros((sums.shape[0], V_PAD), tl.float32)
            faded = tl.full((sums.shape[0],), 1.0, tl.float32)
        for first in range(0, count, TILE):
            tokens = first + column_of(tl.arange(0, TILE), TILE, KEY_PARTS)
            live = tokens < count
            codes = load_codes(run, kept, kept_mask, first, TILE, TILE, KEY_ROW, KEY_BITS, DTYPE)
            if KEY_PARTS > 1:
                # A tile lies within a group: its scales go into the queries, its zeros into one
                # number per query row.
                index = first // GROUP * C + kept
                scales = load_halves(run + KEY_SCALES, index, kept_mask)
                zeros = load_halves(run + KEY_ZEROS, index, kept_mask)
                wide = gathered.to(tl.float32)
                scores = dot(wide * scales[None, :], codes, DTYPE, DOT, PRECISION)
                scores += tl.sum(wide * zeros[None, :], axis=1)[:, None]
            else:
                scores = dot(gathered, codes, DTYPE, DOT, PRECISION)
            weights, older, top, total = weigh(
                scores, live[None, :], top, total, factor, cap, CAPPED
            )
            values = load_values(
                run, tokens, live, V, V_PAD, T, VALUE_BITS, GROUP, VALUES, VALUE_ROW,
                VALUE_SCALES, VALUE_ZEROS, DTYPE,
            )  # fmt: skip
            added = dot(weights, values, DTYPE, DOT, PRECISION)
            if VALUE_BITS == 8:
                # Not into the weights: small ones would lose their digits in float16.
                added = added * load_scale(run + VALUE_SCALES)
            if VALUE_TABLE >= 0:
                kept_sums = kept_sums * older[:, None] + added
                faded *= older
            else:
                sums = sums * older[:, None] + added
        if VALUE_TABLE >= 0:
            found = scatter_channels(kept_sums, run + VALUE_TABLE, V, D_PAD, VALUE_BITS)
            sums = sums * faded[:, None] + found
    return top, total, sums


@triton.jit
def attend_dense(
    top, total, sums, query_at, row_mask, position, kv_ptr, table, kv_head, begin, end, seq_len,
    scale, cap, block_stride, head_stride,
    D_PAD: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend to dense blocks ``begin .. end - 1``, entries of the block table, TILE tokens a time.

    A row's query is at ``position`` ``[ROWS]`` and sees nothing behind it, nor behind ``seq_len``.
    ``sums`` has its channels in order here. All else as in ``attend_thin``.
    """
    channels = tl.arange(0, D_PAD)
    channel_mask = channels < D
    query = tl.load(
        query_at + channels[None, :], mask=row_mask[:, None] & channel_mask[None, :], other=0.0
    )
    last = tl.minimum(end * N, seq_len)
    for first in range(begin * N, last, TILE):
        tokens = first + tl.arange(0, TILE)
        live = tokens < last
        # Tokens have pages of their own, so tiles need not fit blocks.
        page = tl.load(table + tokens // N, mask=live, other=0)
        run = as_elements(find_run(kv_ptr, page, kv_head, block_stride, head_stride), DTYPE)
        rows = dense_rows(run, tokens % N, D)
        # Weights of tokens that nobody sees are 0, which leaves a NaN a NaN.
        mask = live[:, None] & channel_mask[None, :]
        keys = tl.load(rows[:, None] + channels[None, :], mask=mask, other=0.0)
        scores = dot(query, tl.trans(keys), DTYPE, DOT, PRECISION)
        seen = live[None, :] & (tokens[None, :] <= position[:, None])
        weights, older, top, total = weigh(scores, seen, top, total, scale, cap, CAPPED)
        values = tl.load((rows + D)[:, None] + channels[None, :], mask=mask, other=0.0)
        sums = sums * older[:, None] + dot(weights, values, DTYPE, DOT, PRECISION)
    return top, total, sums
