"""Zeros of e4m3 keys: what they add to scores.

Every thin block has its own, and a tile goes on from block to block, so zeros are loaded as keys
are (``units.load_keys``), one row for each unit of a tile.
"""

import triton
import triton.language as tl

from csrc_triton.blocks import find_pages
from csrc_triton.dots import dot
from csrc_triton.units import LANES


@triton.jit
def score_zeros(
    query, kv_ptr, entries, head_offset, block_stride, first, channel,
    CHANNELS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A 256th of the scores of e4m3 keys' zeros, for tokens in order: ``[TILE, QUERIES]``.

    Every unit of a tile has a row of zeros in one small product more, and its tokens share it: no
    token is touched but by the addition.
    """
    zeros = load_zeros(kv_ptr, entries, head_offset, block_stride, first, channel, CHANNELS, L)
    scores = dot(zeros, query, L.NUMBER, L.NUMBER) * (1 / 256)
    scores = tl.broadcast_to(scores[:, None, :], [L.TILE // 4, 4, query.shape[1]])
    return tl.reshape(scores, [L.TILE, query.shape[1]])


@triton.jit
def load_zeros(
    kv_ptr, entries, head_offset, block_stride, first, channel,
    CHANNELS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Load zeros of e4m3 keys, for units of a span from token ``first`` on: ``[UNITS, CHANNELS]``.

    Channels as in ``load_keys``, 0 from C on.
    """
    UNITS: tl.constexpr = L.TILE // 4
    OUTER: tl.constexpr = UNITS // LANES
    TIMES: tl.constexpr = CHANNELS // 16
    unit = first // 4 + tl.arange(0, OUTER)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    unit = tl.minimum(unit, L.SPAN * L.N // 4 - 1)
    run = find_pages(kv_ptr, entries, unit // (L.T // 4), head_offset, block_stride)
    run = run.to(tl.pointer_type(tl.int32), bitcast=True)
    word = channel // 2 + tl.arange(0, TIMES)[:, None, None, None] * 8
    # Words of two channels each, in the order in which four threads hold those of keys.
    if L.C % 4 == 0:
        word += tl.arange(0, 4)[None, None, :, None] * 2 + tl.arange(0, 2)[None, None, None, :]
        at = (run + L.KEYS.ZEROS // 4)[:, None, :, None, None] + word[None]
        # Two neighbours for a thread, not four.
        at = tl.max_contiguous(at, [1, 1, 1, 1, 2])
    else:
        word += tl.arange(0, 2)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
        at = (run + L.KEYS.ZEROS // 4)[:, None, None, :, None] + word[None]
        at = tl.max_contiguous(at, [1, 1, 1, 1, 1])
    words = tl.load(at, mask=word[None] < L.C // 2, other=0)
    low = words.to(tl.int16).to(tl.float16, bitcast=True)
    high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    zeros = tl.join(low, high)
    if L.C % 4 == 0:
        zeros = tl.permute(zeros, (0, 2, 1, 3, 4, 5))
    else:
        zeros = tl.permute(zeros, (0, 3, 1, 4, 2, 5))
    return tl.reshape(zeros, [UNITS, CHANNELS]).to(L.NUMBER)
