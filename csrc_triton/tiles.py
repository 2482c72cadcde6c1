"""The loops of attention: queries over thin blocks, and over dense ones.

Queries are columns here: query heads of one KV head, of one token or of several, so that every key
and value is read once for all of them. Keys ``[tokens, channels]`` and values ``[channels,
tokens]`` are the left operands of products, which is what makes quantized ones fit the registers of
tensor cores (``units.py``), and a group of up to 8 query heads fills a product. Both loops carry a
running softmax: ``top`` and ``total`` [QUERIES] and ``sums`` [D_PAD, QUERIES], channels in order.
``top`` is times log2(e). Weights are 2 ** BOOST times those of the softmax, in ``total`` and
``sums`` alike: small ones keep more digits in float16.
"""

import triton
import triton.language as tl

from csrc_triton.blocks import dense_rows, find_pages
from csrc_triton.dots import dot
from csrc_triton.matrices import as_elements
from csrc_triton.plain import load_plain_keys, load_plain_values, load_scales
from csrc_triton.queries import gather_query, query_exponent
from csrc_triton.softmax import weigh
from csrc_triton.units import LANES, load_keys, load_values, natural_order, shared_units
from csrc_triton.zeros import score_zeros


@triton.constexpr_function
def span_tiles(L):
    """Tiles that cover a span; the last one may overhang."""
    return (L.SPAN * L.N + L.TILE - 1) // L.TILE


@triton.jit
def attend_thin(
    top, total, sums, query_at, query_mask, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride, L: tl.constexpr,
):  # fmt: skip
    """Attend to tiles ``begin .. end - 1`` of a request's thin spans, ``span_tiles`` in each.

    No query's own token is thin, so there is no causal mask. Tiles cross the thin blocks of a span,
    and end with it: the next one can keep other channels. So queries are gathered once a span.

    ``query_at`` ``[QUERIES]`` points to the first channel of each query, ``query_mask`` says which
    are queries, ``table`` points to the request's row of the block table. Strides are bytes; ``L``
    is the ``AttentionLayout``.
    """
    QUERIES: tl.constexpr = query_at.shape[0]
    TILES: tl.constexpr = span_tiles(L)
    KEY_BITS: tl.constexpr = L.KEYS.BITS
    VALUE_BITS: tl.constexpr = L.VALUES.BITS
    VALUE_TABLE: tl.constexpr = L.VALUES.TABLE
    head_offset = kv_head.to(tl.int64) * head_stride
    factor = tl.full((QUERIES,), 1.0, tl.float32)
    scales = scale * factor
    if KEY_BITS != 0:
        factor = query_exponent(query_at, query_mask, L)
        # e4m3 codes come as a 256th of what they stand for.
        scales = scale / factor * (256.0 if KEY_BITS == 8 else 1.0)
    place = natural_places(L.TILE, KEY_BITS)
    faded = tl.full((QUERIES,), 1.0, tl.float32)
    kept_sums = tl.zeros((L.V_PAD, QUERIES), tl.float32)
    for span in range(begin // TILES, tl.cdiv(end, TILES)):
        entries = table + span * L.SPAN
        run = find_pages(kv_ptr, entries, 0, head_offset, block_stride)
        query = gather_query(query_at, query_mask, factor, run, 0, L.C_FIRST, L)
        query_rest = query
        if L.C_REST:
            query_rest = gather_query(query_at, query_mask, factor, run, L.C_FIRST, L.C_REST, L)
        last = tl.minimum(end - span * TILES, TILES) * L.TILE
        for first in range(tl.maximum(begin - span * TILES, 0) * L.TILE, last, L.TILE):
            # Triton would not see that otherwise.
            first = tl.multiple_of(first, L.TILE)
            scores = score_keys(
                query, kv_ptr, entries, head_offset, block_stride, first, 0, L.C_FIRST, L
            )
            if L.C_REST:
                scores += score_keys(
                    query_rest, kv_ptr, entries, head_offset, block_stride, first, L.C_FIRST,
                    L.C_REST, L,
                )  # fmt: skip
            if KEY_BITS == 8:
                of_zeros = score_zeros(
                    query, kv_ptr, entries, head_offset, block_stride, first, 0, L.C_FIRST, L
                )
                if L.C_REST:
                    of_zeros += score_zeros(
                        query_rest, kv_ptr, entries, head_offset, block_stride, first, L.C_FIRST,
                        L.C_REST, L,
                    )  # fmt: skip
                of_tokens = load_scales(
                    kv_ptr, entries, head_offset, block_stride, first, L.KEYS.SCALES, L
                )
                scores = natural_order(scores, 32 // KEY_BITS, LANES) * of_tokens[:, None]
                scores += of_zeros
            live = first + place < L.SPAN * L.N
            weights, older, top, total = weigh(
                scores, live[:, None], top, total, scales, cap, L.CAPPED
            )
            if VALUE_TABLE >= 0:
                sums = sums * older[None, :]
            else:
                faded *= older
            kept_sums = kept_sums * older[None, :]
            if VALUE_BITS == 0:
                values = load_plain_values(kv_ptr, entries, head_offset, block_stride, first, L)
                kept_sums += dot(values, weights, L.DTYPE, L.DOT)
            else:
                largest = 1.0
                if VALUE_BITS == 8:
                    # Blocks of a tile have scales of their own; the largest stays out of the
                    # weights, so that these keep float16's range.
                    of_tokens = load_scales(
                        kv_ptr, entries, head_offset, block_stride, first, L.VALUES.SCALES, L
                    )
                    largest = tl.max(of_tokens, axis=0)
                    share = of_tokens / tl.where(largest == 0.0, 1.0, largest)
                    weights = weights * share[:, None]
                # Both halves of 2-bit units, of 8 tokens each; otherwise too much is in registers.
                PARTS: tl.constexpr = 2 if KEY_BITS == 2 else 1
                for part in tl.static_range(PARTS):
                    some = part_of(weights, part, PARTS)
                    if KEY_BITS == 4 or KEY_BITS == 2:
                        some = natural_order(some, 8, LANES)
                    values = load_values(
                        kv_ptr, entries, head_offset, block_stride, first // 8 + part,
                        L.TILE // PARTS, PARTS, L,
                    )  # fmt: skip
                    added = dot(values, some, L.NUMBER, L.NUMBER)
                    kept_sums += added * (largest * 256.0) if VALUE_BITS == 8 else added
        if VALUE_TABLE >= 0:
            kept_sums = in_order(kept_sums, L.V_PAD, VALUE_BITS)
            sums += scatter_channels(kept_sums, run + VALUE_TABLE, L.V, L.D_PAD)
            kept_sums = tl.zeros((L.V_PAD, QUERIES), tl.float32)
    if VALUE_TABLE < 0:
        sums = sums * faded[None, :] + in_order(kept_sums, L.V_PAD, VALUE_BITS)
    return top, total, sums


@triton.jit
def score_keys(
    query, kv_ptr, entries, head_offset, block_stride, first, channel,
    CHANNELS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Products ``[TILE, QUERIES]`` of a tile's keys and queries, over some channels."""
    if L.KEYS.BITS == 0:
        keys = load_plain_keys(
            kv_ptr, entries, head_offset, block_stride, first, channel, CHANNELS, L
        )
        return dot(keys, query, L.DTYPE, L.DOT)
    else:
        keys = load_keys(kv_ptr, entries, head_offset, block_stride, first, channel, CHANNELS, L)
        return dot(keys, query, L.NUMBER, L.NUMBER)


@triton.jit
def part_of(weights, part: tl.constexpr, PARTS: tl.constexpr):
    """Rows of one of PARTS equal parts of a tile."""
    if PARTS == 1:
        return weights
    else:
        ROWS: tl.constexpr = weights.shape[0] // 2
        halves = tl.permute(tl.reshape(weights, [2, ROWS, weights.shape[1]]), (1, 2, 0))
        first, second = tl.split(halves)
        if part == 0:
            return first
        else:
            return second


@triton.jit
def natural_places(TILE: tl.constexpr, BITS: tl.constexpr):
    """Which token of a tile each row of scores is, int32 ``[TILE]``."""
    row = tl.arange(0, TILE)
    if BITS == 4 or BITS == 2:
        COLUMNS: tl.constexpr = 32 // BITS
        return (
            row // (LANES * COLUMNS) * (LANES * COLUMNS)
            + row % LANES * COLUMNS
            + (row // LANES % COLUMNS)
        )
    else:
        return row


@triton.jit
def in_order(sums, V_PAD: tl.constexpr, BITS: tl.constexpr):
    """Sums over quantized values, channels in order."""
    if BITS == 0:
        return sums
    else:
        return natural_order(sums, 32 // BITS, shared_units(V_PAD, BITS))


@triton.jit
def scatter_channels(kept, table, V: tl.constexpr, D_PAD: tl.constexpr):
    """Sums of kept channels ``[V_PAD, QUERIES]`` -> of all channels ``[D_PAD, QUERIES]``.

    Those of pruned channels are 0.

    Args:
        kept: What is known of each kept channel.
        table: Byte pointer to the kept channels, ascending.
        V: Kept channels.
        D_PAD: Channels, rounded up.
    """
    QUERIES: tl.constexpr = kept.shape[1]
    index = tl.arange(0, kept.shape[0])
    channel = tl.load(table + index, mask=index < V, other=0).to(tl.int32)
    held = tl.histogram(channel, D_PAD, mask=index < V)
    place = tl.maximum(tl.cumsum(held, axis=0) - 1, 0)
    found = tl.gather(kept, tl.broadcast_to(place[:, None], [D_PAD, QUERIES]), axis=0)
    return tl.where((held > 0)[:, None], found, 0.0)


@triton.jit
def attend_dense(
    top, total, sums, query_at, query_mask, position, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride, L: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``begin .. end - 1`` of a request's dense blocks, DENSE_TILE at a time.

    A query is at ``position`` ``[QUERIES]`` and sees nothing behind it. All else as in
    ``attend_thin``.
    """
    channels = tl.arange(0, L.D_PAD)
    query = tl.load(
        query_at[None, :] + channels[:, None],
        mask=query_mask[None, :] & (channels < L.D)[:, None],
        other=0.0,
    )
    scales = tl.full((query.shape[1],), 1.0, tl.float32) * scale
    head_offset = kv_head.to(tl.int64) * head_stride
    # Loads ahead would take shared memory, and so programs, on GPUs.
    for first in tl.range(begin, end, L.DENSE_TILE, num_stages=1):
        token = first + tl.arange(0, L.DENSE_TILE)
        live = token < end
        page = tl.load(table + token // L.N, mask=live, other=0).to(tl.int64)
        run = as_elements(kv_ptr + page * block_stride + head_offset, L.DTYPE)
        mask = live[:, None] & (channels < L.D)[None, :]
        rows = dense_rows(run, token % L.N, L.D)[:, None] + channels[None, :]
        keys = tl.load(rows, mask=mask, other=0.0)
        scores = dot(keys, query, L.DTYPE, L.DOT)
        seen = live[:, None] & (token[:, None] <= position[None, :])
        weights, older, top, total = weigh(scores, seen, top, total, scales, cap, L.CAPPED)
        # Weights of tokens that no query sees are 0, which leaves a NaN a NaN.
        values = tl.load(rows + L.D, mask=mask, other=0.0)
        sums = sums * older[None, :] + dot(tl.trans(values), weights, L.DTYPE, L.DOT)
    return top, total, sums
