"""Thin blocks as computed, and the scales of e4m3 ones: tiles that go on from block to block."""

import triton
import triton.language as tl

from csrc_triton.blocks import find_pages
from csrc_triton.matrices import as_elements, load_scale


@triton.jit
def load_plain_keys(
    kv_ptr, entries, head_offset, block_stride, first, channel,
    TILE: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
    N: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Load keys as computed of tokens of a span: ``[TILE, CHANNELS]``. See ``units.load_keys``."""
    STEP: tl.constexpr = 8 if T % 8 == 0 else 4  # tokens that lie in one block
    step = tl.minimum(first // STEP + tl.arange(0, TILE // STEP), SPAN * N // STEP - 1)
    run = find_pages(kv_ptr, entries, step // (T // STEP), head_offset, block_stride)
    run = as_elements(run, DTYPE)
    channels = channel + tl.arange(0, CHANNELS)
    at = (run + step % (T // STEP) * STEP)[None, :, None] + tl.arange(0, STEP)[None, None, :]
    mask = (channels < C)[:, None, None]
    keys = tl.load(at + channels[:, None, None] * T, mask=mask, other=0.0)
    return tl.trans(tl.reshape(keys, [CHANNELS, TILE]))


@triton.jit
def load_plain_values(
    kv_ptr, entries, head_offset, block_stride, first,
    TILE: tl.constexpr, V_PAD: tl.constexpr, DTYPE: tl.constexpr,
    N: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr, V: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Load values as computed of tokens of a span: ``[V_PAD, TILE]``. See ``units.load_values``."""
    STEP: tl.constexpr = 8 if T % 8 == 0 else 4
    step = tl.minimum(first // STEP + tl.arange(0, TILE // STEP), SPAN * N // STEP - 1)
    run = find_pages(kv_ptr, entries, step // (T // STEP), head_offset, block_stride)
    run = as_elements(run, DTYPE)
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    row = step[:, None] % (T // STEP) * STEP + tl.arange(0, STEP)[None, :]
    channels = tl.arange(0, V_PAD)
    at = (run[:, None] + (OFFSET // SIZE + row * V))[:, :, None] + channels[None, None, :]
    values = tl.load(at, mask=(channels < V)[None, None, :], other=0.0)
    return tl.trans(tl.reshape(values, [TILE, V_PAD]))


@triton.jit
def load_scales(
    kv_ptr, entries, head_offset, block_stride, first,
    TILE: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Scales of e4m3 matrices for tokens of a span, in order: float32 ``[TILE]``."""
    octet = tl.minimum(first // 8 + tl.arange(0, TILE // 8), SPAN * N // 8 - 1)
    run = find_pages(kv_ptr, entries, octet // (T // 8), head_offset, block_stride)
    scales = load_scale(run + OFFSET)
    return tl.reshape(tl.broadcast_to(scales[:, None], [TILE // 8, 8]), [TILE])
