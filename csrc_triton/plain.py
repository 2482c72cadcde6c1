"""Thin blocks as computed, and the scales of e4m3 ones: tiles that go on from block to block."""

import triton
import triton.language as tl

from csrc_triton.blocks import find_pages
from csrc_triton.matrices import as_elements


@triton.jit
def load_plain_keys(
    kv_ptr, entries, head_offset, block_stride, first, channel,
    CHANNELS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Load keys as computed of tokens of a span: ``[TILE, CHANNELS]``. See ``units.load_keys``."""
    STEP: tl.constexpr = 8 if L.T % 8 == 0 else 4  # tokens that lie in one block
    step = tl.minimum(first // STEP + tl.arange(0, L.TILE // STEP), L.SPAN * L.N // STEP - 1)
    run = find_pages(kv_ptr, entries, step // (L.T // STEP), head_offset, block_stride)
    run = as_elements(run, L.DTYPE)
    channels = channel + tl.arange(0, CHANNELS)
    at = (run + step % (L.T // STEP) * STEP)[None, :, None] + tl.arange(0, STEP)[None, None, :]
    mask = (channels < L.C)[:, None, None]
    keys = tl.load(at + channels[:, None, None] * L.T, mask=mask, other=0.0)
    return tl.trans(tl.reshape(keys, [CHANNELS, L.TILE]))


@triton.jit
def load_plain_values(kv_ptr, entries, head_offset, block_stride, first, L: tl.constexpr):
    """Load values as computed of tokens of a span: ``[V_PAD, TILE]``. See ``units.load_values``."""
    STEP: tl.constexpr = 8 if L.T % 8 == 0 else 4
    step = tl.minimum(first // STEP + tl.arange(0, L.TILE // STEP), L.SPAN * L.N // STEP - 1)
    run = find_pages(kv_ptr, entries, step // (L.T // STEP), head_offset, block_stride)
    run = as_elements(run, L.DTYPE)
    FIRST: tl.constexpr = L.VALUES.OFFSET // (L.DTYPE.primitive_bitwidth // 8)
    row = step[:, None] % (L.T // STEP) * STEP + tl.arange(0, STEP)[None, :]
    channels = tl.arange(0, L.V_PAD)
    at = (run[:, None] + (FIRST + row * L.V))[:, :, None] + channels[None, None, :]
    values = tl.load(at, mask=(channels < L.V)[None, None, :], other=0.0)
    return tl.trans(tl.reshape(values, [L.TILE, L.V_PAD]))


@triton.jit
def load_scales(
    kv_ptr, entries, head_offset, block_stride, first, OFFSET: tl.constexpr, L: tl.constexpr
):
    """Scales of e4m3 matrices for tokens of a span, in order: float32 ``[TILE]``."""
    octet = tl.minimum(first // 8 + tl.arange(0, L.TILE // 8), L.SPAN * L.N // 8 - 1)
    run = find_pages(kv_ptr, entries, octet // (L.T // 8), head_offset, block_stride)
    scales = tl.load(as_elements(run + OFFSET, tl.float32))
    return tl.reshape(tl.broadcast_to(scales[:, None], [L.TILE // 8, 8]), [L.TILE])
