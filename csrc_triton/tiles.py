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
def span_tiles(SPAN, N, TILE):
    """Tiles that cover a span; the last one may overhang."""
    return (SPAN * N + TILE - 1) // TILE


@triton.jit
def attend_thin(
    top, total, sums, query_at, query_mask, kv_ptr, table, kv_head, begin, end,
    scale, cap, block_stride, head_stride,
    C_FIRST: tl.constexpr, C_REST: tl.constexpr, V_PAD: tl.constexpr, D_PAD: tl.constexpr,
    TILE: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr,
    KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_SCALES: tl.constexpr,
    TABLE: tl.constexpr, V: tl.constexpr, VALUE_TABLE: tl.constexpr,
):  # fmt: skip
    """Attend to tiles ``begin .. end - 1`` of a request's thin spans, ``span_tiles`` in each.

    No query's own token is thin, so there is no causal mask. Tiles cross the thin blocks of a span,
    and end with it: the next one can keep other channels. So queries are gathered once a span.

    ``query_at`` ``[QUERIES]`` points to the first channel of each query, ``query_mask`` says which
    are queries, ``table`` points to the request's row of the block table. Strides are bytes; the
    constants are those of ``blocks.LAYOUT_NAMES`` and ``decode.attention_constants``.
    """
    QUERIES: tl.constexpr = query_at.shape[0]
    TILES: tl.constexpr = span_tiles(SPAN, N, TILE)
    head_offset = kv_head.to(tl.int64) * head_stride
    factor = tl.full((QUERIES,), 1.0, tl.float32)
    scales = scale * factor
    if KEY_BITS != 0:
        factor = query_exponent(query_at, query_mask, D_PAD, D)
        # e4m3 codes come as a 256th of what they stand for.
        scales = scale / factor * (256.0 if KEY_BITS == 8 else 1.0)
    place = natural_places(TILE, KEY_BITS)
    faded = tl.full((QUERIES,), 1.0, tl.float32)
    kept_sums = tl.zeros((V_PAD, QUERIES), tl.float32)
    QUERY: tl.constexpr = DTYPE if KEY_BITS == 0 else NUMBER
    for span in range(begin // TILES, tl.cdiv(end, TILES)):
        entries = table + span * SPAN
        run = find_pages(kv_ptr, entries, 0, head_offset, block_stride)
        query = gather_query(
            query_at, query_mask, factor, run + TABLE, 0, C_FIRST, C, TABLE, KEY_BITS, QUERY
        )
        query_rest = query
        if C_REST:
            query_rest = gather_query(
                query_at, query_mask, factor, run + TABLE, C_FIRST, C_REST, C, TABLE, KEY_BITS,
                QUERY,
            )  # fmt: skip
        last = tl.minimum(end - span * TILES, TILES) * TILE
        for first in range(tl.maximum(begin - span * TILES, 0) * TILE, last, TILE):
            # Triton would not see that otherwise.
            first = tl.multiple_of(first, TILE)
            if KEY_BITS == 0:
                keys = load_plain_keys(
                    kv_ptr, entries, head_offset, block_stride, first, 0, TILE, C_FIRST, DTYPE,
                    N, SPAN, T, C,
                )  # fmt: skip
                scores = dot(keys, query, DTYPE, DOT, PRECISION)
                if C_REST:
                    keys = load_plain_keys(
                        kv_ptr, entries, head_offset, block_stride, first, C_FIRST, TILE, C_REST,
                        DTYPE, N, SPAN, T, C,
                    )  # fmt: skip
                    scores += dot(keys, query_rest, DTYPE, DOT, PRECISION)
            else:
                keys = load_keys(
                    kv_ptr, entries, head_offset, block_stride, first, 0, TILE, C_FIRST, ASM,
                    NUMBER, N, SPAN, T, C, KEY_BITS, GROUP, KEY_SCALES,
                )  # fmt: skip
                scores = dot(keys, query, NUMBER, NUMBER, PRECISION)
                if C_REST:
                    keys = load_keys(
                        kv_ptr, entries, head_offset, block_stride, first, C_FIRST, TILE, C_REST,
                        ASM, NUMBER, N, SPAN, T, C, KEY_BITS, GROUP, KEY_SCALES,
                    )  # fmt: skip
                    scores += dot(keys, query_rest, NUMBER, NUMBER, PRECISION)
            if KEY_BITS == 8:
                of_zeros = score_zeros(
                    query, kv_ptr, entries, head_offset, block_stride, first, 0, TILE, C_FIRST,
                    NUMBER, PRECISION, N, SPAN, T, C, KEY_ZEROS,
                )  # fmt: skip
                if C_REST:
                    of_zeros += score_zeros(
                        query_rest, kv_ptr, entries, head_offset, block_stride, first, C_FIRST,
                        TILE, C_REST, NUMBER, PRECISION, N, SPAN, T, C, KEY_ZEROS,
                    )  # fmt: skip
                of_tokens = load_scales(
                    kv_ptr, entries, head_offset, block_stride, first, TILE, N, SPAN, T, KEY_SCALES
                )
                scores = natural_order(scores, 32 // KEY_BITS, LANES) * of_tokens[:, None]
                scores += of_zeros
            live = first + place < SPAN * N
            weights, older, top, total = weigh(
                scores, live[:, None], top, total, scales, cap, CAPPED
            )
            if VALUE_TABLE >= 0:
                sums = sums * older[None, :]
            else:
                faded *= older
            kept_sums = kept_sums * older[None, :]
            if VALUE_BITS == 0:
                values = load_plain_values(
                    kv_ptr, entries, head_offset, block_stride, first, TILE, V_PAD, DTYPE,
                    N, SPAN, T, V, VALUES,
                )  # fmt: skip
                kept_sums += dot(values, weights, DTYPE, DOT, PRECISION)
            else:
                largest = 1.0
                if VALUE_BITS == 8:
                    # Blocks of a tile have scales of their own; the largest stays out of the
                    # weights, so that these keep float16's range.
                    of_tokens = load_scales(
                        kv_ptr, entries, head_offset, block_stride, first, TILE, N, SPAN, T,
                        VALUE_SCALES,
                    )  # fmt: skip
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
                        TILE // PARTS, PARTS, V_PAD, ASM, NUMBER,
                        N, SPAN, T, V, VALUE_BITS, GROUP, VALUES, VALUE_SCALES,
                    )  # fmt: skip
                    added = dot(values, some, NUMBER, NUMBER, PRECISION)
                    kept_sums += added * (largest * 256.0) if VALUE_BITS == 8 else added
        if VALUE_TABLE >= 0:
            kept_sums = in_order(kept_sums, V_PAD, VALUE_BITS)
            sums += scatter_channels(kept_sums, run + VALUE_TABLE, V, D_PAD)
            kept_sums = tl.zeros((V_PAD, QUERIES), tl.float32)
    if VALUE_TABLE < 0:
        sums = sums * faded[None, :] + in_order(kept_sums, V_PAD, VALUE_BITS)
    return top, total, sums


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
    scale, cap, block_stride, head_stride,
    D_PAD: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Attend to tokens ``begin .. end - 1`` of a request's dense blocks, TILE at a time.

    A query is at ``position`` ``[QUERIES]`` and sees nothing behind it. All else as in
    ``attend_thin``.
    """
    channels = tl.arange(0, D_PAD)
    query = tl.load(
        query_at[None, :] + channels[:, None],
        mask=query_mask[None, :] & (channels < D)[:, None],
        other=0.0,
    )
    scales = tl.full((query.shape[1],), 1.0, tl.float32) * scale
    head_offset = kv_head.to(tl.int64) * head_stride
    # Loads ahead would take shared memory, and so programs, on GPUs.
    for first in tl.range(begin, end, TILE, num_stages=1):
        token = first + tl.arange(0, TILE)
        live = token < end
        page = tl.load(table + token // N, mask=live, other=0).to(tl.int64)
        run = as_elements(kv_ptr + page * block_stride + head_offset, DTYPE)
        mask = live[:, None] & (channels < D)[None, :]
        rows = dense_rows(run, token % N, D)[:, None] + channels[None, :]
        keys = tl.load(rows, mask=mask, other=0.0)
        scores = dot(keys, query, DTYPE, DOT, PRECISION)
        seen = live[:, None] & (token[:, None] <= position[None, :])
        weights, older, top, total = weigh(scores, seen, top, total, scales, cap, CAPPED)
        # Weights of tokens that no query sees are 0, which leaves a NaN a NaN.
        values = tl.load(rows + D, mask=mask, other=0.0)
        sums = sums * older[None, :] + dot(tl.trans(values), weights, DTYPE, DOT, PRECISION)
    return top, total, sums
