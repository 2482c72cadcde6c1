"""Queries as products over thin blocks take them: the channels that a span keeps."""

import triton
import triton.language as tl


@triton.jit
def query_exponent(query_at, query_mask, L: tl.constexpr):
    """Powers of two that bring queries into float16's range, ``[QUERIES]`` float32.

    Channels beyond it, of models in bfloat16, would become infinite. A power of two costs no digit.
    """
    channels = tl.arange(0, L.D_PAD)
    mask = query_mask[None, :] & (channels < L.D)[:, None]
    query = tl.load(query_at[None, :] + channels[:, None], mask=mask, other=0.0)
    largest = tl.max(tl.abs(query.to(tl.float32)), axis=0)
    exponent = tl.minimum(largest.to(tl.int32, bitcast=True) >> 23, 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gather_query(query_at, query_mask, factor, run, first, CHANNELS: tl.constexpr, L: tl.constexpr):
    """Channels of queries that a span keeps: ``[CHANNELS, QUERIES]``, 0 behind the last.

    Args:
        query_at: Pointers to the first channel of each query.
        query_mask: Which of them are queries.
        factor: Of ``query_exponent``.
        run: Byte pointer to a run of the span, which has the table of kept channels.
        first: First kept channel.
        CHANNELS: How many; in the order in which keys are loaded.
        L: The ``AttentionLayout``.
    """
    if L.KEYS.BITS == 0:
        kept = first + tl.arange(0, CHANNELS)
    else:
        kept = first + channel_order(CHANNELS, L.C)
    channel = kept
    if L.KEYS.TABLE >= 0:
        channel = tl.load(run + L.KEYS.TABLE + kept, mask=kept < L.C, other=0).to(tl.int32)
    mask = query_mask[None, :] & (kept < L.C)[:, None]
    query = tl.load(query_at[None, :] + channel[:, None], mask=mask, other=0.0)
    if L.KEYS.BITS == 0:
        return query
    else:
        return (query.to(tl.float32) * factor[None, :]).to(L.NUMBER)


@triton.jit
def channel_order(CHANNELS: tl.constexpr, C: tl.constexpr):
    """Which channel of a part of the keys each column of ``load_keys`` is: int32 ``[CHANNELS]``."""
    column = tl.arange(0, CHANNELS)
    if C % 4 == 0:
        return column
    else:
        # Rows of units are 8 bytes apart, and threads load no more than one at once.
        return column % 2 + column // 4 % 4 * 2 + column // 2 % 2 * 8 + column // 16 * 16
