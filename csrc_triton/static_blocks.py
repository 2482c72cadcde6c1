"""Static blocks as kernels see them: compile-time sizes and offsets, and a layer's channels."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from csrc_triton.checks import check_tensor
from csrc_triton.dots import dot_constants
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


def static_constants(plan: StaticPlan, dtype: torch.dtype) -> dict[str, Any]:
    """What every kernel over static blocks knows at compile time.

    D head size, N tokens of a block, C and V kept channels of keys and values and the powers of
    two that hold them, BITS of a code (0: elements of the model's dtype, 8: e4m3); then byte
    offsets from the start of a run, and bytes of a row of codes.
    """
    layout, size = plan.layout, plan.layout.stored_itemsize
    return {
        "D": plan.head_size,
        "N": plan.block_size,
        "C": plan.key_channels,
        "V": plan.value_channels,
        "C_PAD": max(MIN_PAD, triton.next_power_of_2(plan.key_channels)),
        "V_PAD": max(MIN_PAD, triton.next_power_of_2(plan.value_channels)),
        "BITS": 8 if plan.is_quantized else 0,
        "KEYS": layout.keys_offset,
        "KEY_ROW": plan.block_size * size,
        "VALUE_ROW": plan.value_channels * size,
        "KEY_SCALES": layout.key_scales_offset,
        "VALUE_SCALES": layout.value_scales_offset,
        **dot_constants(dtype),
    }


def tile_tokens(plan: StaticPlan, most: int) -> int:
    """Tokens of a tile: ``most``, a power of two, or fewer, so that none lies in two blocks."""
    return math.gcd(plan.block_size, most)


def check_order(
    who: str, order: ChannelOrder, num_kv_heads: int, plan: StaticPlan, device: torch.device
) -> None:
    """Check a layer's channels.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
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
) -> None:
    """Check what attention over static blocks is given.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    check_static_cache(who, kv_cache, query.dtype, plan)
    num_kv_heads, head_size = kv_cache.shape[1], plan.head_size
    check_order(who, order, num_kv_heads, plan, kv_cache.device)
    if query.dim() != 3 or query.shape[2] != head_size or query.stride(2) != 1:
        raise ValueError(
            f"{who}: query has shape {tuple(query.shape)} and strides {query.stride()}; expected "
            f"[tokens, Hq, {head_size}] with contiguous channels"
        )
    if query.shape[1] == 0 or query.shape[1] % num_kv_heads:
        raise ValueError(
            f"{who}: query has {query.shape[1]} heads, there are {num_kv_heads} KV heads; "
            "expected a positive multiple"
        )
    if out.shape != query.shape or out.dtype != query.dtype or out.stride(2) != 1:
        raise ValueError(
            f"{who}: out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; expected "
            f"{query.dtype} {tuple(query.shape)} with contiguous channels"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"{who}: block_table is {block_table.dtype} {tuple(block_table.shape)} with strides "
            f"{block_table.stride()}; expected int32 [num_requests, W], rows contiguous"
        )
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
