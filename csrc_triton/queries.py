"""Queries as products over thin blocks take them: the channels that a span keeps."""

import triton
import triton.language as tl

from csrc_triton.units import channel_order


@triton.jit
def query_exponent(query_at, query_mask, D_PAD: tl.constexpr, D: tl.constexpr):
    """Powers of two that bring queries into float16's range, ``[QUERIES]`` float32.

    Channels beyond it, of models in bfloat16, would become infinite. A power of two costs no digit.
    """
    channels = tl.arange(0, D_PAD)
    mask = query_mask[None, :] & (channels < D)[:, None]
    query = tl.load(query_at[None, :] + channels[:, None], mask=mask, other=0.0)
    largest = tl.max(tl.abs(query.to(tl.float32)), axis=0)
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gather_query(
    query_at, query_mask, factor, table, first, CHANNELS: tl.constexpr, C: tl.constexpr,
    TABLE: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr,
):  # fmt: skip
    """Channels of queries that a span keeps: ``[CHANNELS, QUERIES]``, 0 behind the last.

    Args:
        query_at: Pointers to the first channel of each query.
        query_mask: Which of them are queries.
        factor: Of ``query_exponent``.
        table: Byte pointer to the span's kept channels.
        first: First kept channel.
        CHANNELS: How many; in the order in which keys are loaded.
        C: Kept channels.
        TABLE: Negative if every channel is kept.
        BITS: Of key codes.
        NUMBER: Of the result.
    """
    if BITS == 0:
        kept = first + tl.arange(0, CHANNELS)
    else:
        kept = first + channel_order(CHANNELS, C)
    channel = kept
    if TABLE >= 0:
        channel = tl.load(table + kept, mask=kept < C, other=0).to(tl.int32)
    mask = query_mask[None, :] & (kept < C)[:, None]
    query = tl.load(query_at[None, :] + channel[:, None], mask=mask, other=0.0)
    if BITS == 0:
        return query
    else:
        return (query.to(tl.float32) * factor[None, :]).to(NUMBER)
