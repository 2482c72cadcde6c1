"""Static blocks as kernels see them: compile-time sizes and offsets, and a layer's channels."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from csrc_triton.blocks import element_type
from csrc_triton.checks import check_attention, check_tensor
from csrc_triton.dots import dot_type
from csrc_triton.launch import CompileTime
from think_vllm.kernels.checks import check_block_table
from think_vllm.kernels.static_cache import StaticChannels, check_static_cache
from think_vllm.plan.static_plan import StaticPlan

#: Least size of a ``tl.dot`` operand. Blocks have multiples of as many tokens.
MIN_PAD = 16


class ChannelOrder(NamedTuple):
    """All channels of a layer's KV heads: those that are kept, ascending, then those that are not.

    Kernels read the first ones to gather, and scatter by all of them, so that pruned channels of
    an output become zeros in the same store.
    """

    keys: torch.Tensor  # int32 ``[Hk, D]``
    values: torch.Tensor  # int32 ``[Hk, D]``


def order_channels(channels: StaticChannels, head_size: int, device: torch.device) -> ChannelOrder:
    """Put the pruned channels behind the kept ones, on the device.

    Args:
        channels: Of the layer.
        head_size: ``D``.
        device: Of the result.
    """

    def order(kept: torch.Tensor) -> torch.Tensor:
        left = torch.ones(kept.shape[0], head_size, dtype=torch.bool).scatter_(1, kept, False)
        pruned = left.nonzero()[:, 1].view(kept.shape[0], -1)
        return torch.cat([kept, pruned], dim=1).to(device, torch.int32)

    return ChannelOrder(order(channels.keys), order(channels.values))


@dataclass(frozen=True, eq=False)
class StaticLayout(CompileTime):
    """What every kernel over static blocks knows at compile time."""

    D: int  # head size
    N: int  # tokens of a block
    C: int  # kept key channels
    V: int  # kept value channels
    C_PAD: int  # A power of two that holds ``C``
    V_PAD: int  # the same of ``V``
    BITS: int  # of a code; 0 for elements of the model's dtype, 8 for e4m3
    KEYS: int  # byte at which keys begin in a run; values are in front of them
    KEY_ROW: int  # bytes of a row of keys
    VALUE_ROW: int  # bytes of a row of values
    KEY_SCALES: int  # byte at which the scales of keys begin
    VALUE_SCALES: int  # the same of values
    DTYPE: Any  # of the model
    DOT: Any  # see ``dots.dot``


@cache
def make_layout(plan: StaticPlan, dtype: torch.dtype) -> StaticLayout:
    """The layout of a plan's blocks, for a model of ``dtype``."""
    layout, size = plan.layout, plan.layout.stored_itemsize
    return StaticLayout(
        D=plan.head_size,
        N=plan.block_size,
        C=plan.key_channels,
        V=plan.value_channels,
        C_PAD=max(MIN_PAD, triton.next_power_of_2(plan.key_channels)),
        V_PAD=max(MIN_PAD, triton.next_power_of_2(plan.value_channels)),
        BITS=8 if plan.is_quantized else 0,
        KEYS=layout.keys_offset,
        KEY_ROW=plan.block_size * size,
        VALUE_ROW=plan.value_channels * size,
        KEY_SCALES=layout.key_scales_offset,
        VALUE_SCALES=layout.value_scales_offset,
        DTYPE=element_type(dtype),
        DOT=dot_type(dtype),
    )


def tile_tokens(plan: StaticPlan, most: int) -> int:
    """Tokens of a tile: ``most``, a power of two, or fewer, so that none lies in two blocks."""
    return math.gcd(plan.block_size, most)


def check_order(
    who: str, order: ChannelOrder, num_kv_heads: int, plan: StaticPlan, device: torch.device
) -> None:
    """Check a layer's channels."""
    for name, tensor in order._asdict().items():
        expected = (num_kv_heads, plan.head_size)
        check_tensor(who, f"order.{name}", tensor, torch.int32, expected, device)


def check_queries(
    who: str,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    order: ChannelOrder,
    out: torch.Tensor,
    plan: StaticPlan,
    scale: float,
) -> None:
    """Check what attention over static blocks is given."""
    check_static_cache(who, kv_cache, query.dtype, plan)
    num_kv_heads, head_size = kv_cache.shape[1], plan.head_size
    check_order(who, order, num_kv_heads, plan, kv_cache.device)
    check_attention(who, query, num_kv_heads, head_size, query.dtype, out, scale)
    check_block_table(who, block_table)
    devices = {query.device, kv_cache.device, block_table.device, out.device}
    if len(devices) > 1:
        raise ValueError(f"{who}: tensors are on {sorted(map(str, devices))}; expected one device")


@triton.jit
def kept_channels(order_ptr, head, index, KEPT: tl.constexpr, D: tl.constexpr):
    """Channels of a head that are kept: the first ``KEPT`` of ``index``, 0 behind them."""
    if KEPT == D:
        channel = index
    else:
        channel = tl.load(order_ptr + head * D + index, mask=index < KEPT, other=0)
    return channel
