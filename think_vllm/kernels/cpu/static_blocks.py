"""Static blocks as their kernels see them: channels of a layer, and views of a cache."""

from dataclasses import dataclass

import torch

from think_vllm.kernels.cpu.elements import CARRIERS
from think_vllm.static.plan import StaticPlan


@dataclass(frozen=True)
class StaticChannels:
    """Kept channels of a layer.

    Args:
        keys: ``[Hk, C]`` int64, ascending per head.
        values: ``[Hk, V]`` int64, ascending per head.
    """

    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class StaticParts:
    """Views of all blocks of a cache.

    Args:
        keys: ``[B, Hk, C, N]``.
        values: ``[B, Hk, N, V]``.
        key_scales: float32 ``[B, Hk, N]``; without elements unless keys are coded.
        value_scales: As ``key_scales``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor


def static_parts(kv_cache: torch.Tensor, plan: StaticPlan) -> StaticParts:
    """View the parts of a checked cache."""
    layout, runs = plan.layout, kv_cache.view(*kv_cache.shape[:2], -1)
    first = layout.keys_offset // kv_cache.itemsize
    end = layout.key_scales_offset // kv_cache.itemsize
    scales = runs[..., end:]
    of_keys = of_values = scales
    if plan.is_coded:
        half = layout.value_scales_offset - layout.key_scales_offset
        of_keys, of_values = (
            part.view(torch.float32) for part in (scales[..., :half], scales[..., half:])
        )
    return StaticParts(
        keys=runs[..., first:end].unflatten(2, (plan.key_channels, plan.block_size)),
        values=runs[..., :first].unflatten(2, (plan.block_size, plan.value_channels)),
        key_scales=of_keys,
        value_scales=of_values,
    )


def gather_channels(source: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Channels ``[heads, n]`` of ``[tokens, heads, D]``: ``[tokens, heads, n]``."""
    return source.gather(2, channels.expand(source.shape[0], *channels.shape))


def check_static_cache(
    who: str, kv_cache: torch.Tensor, dtype: torch.dtype, plan: StaticPlan
) -> None:
    """Check a cache against a plan and a model's dtype.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if dtype not in CARRIERS or dtype.itemsize != plan.itemsize:
        raise ValueError(
            f"{who}: keys and queries are {dtype}, plan.itemsize is {plan.itemsize}; "
            "expected bfloat16 or float16 with 2, float32 with 4"
        )
    stored = torch.uint8 if plan.is_coded else dtype
    width = plan.layout.token_bytes // stored.itemsize
    if kv_cache.dtype != stored or kv_cache.dim() != 4:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; expected {stored} "
            f"[num_blocks, Hk, {plan.block_size}, {width}]"
        )
    if tuple(kv_cache.shape[2:]) != (plan.block_size, width):
        raise ValueError(
            f"{who}: kv_cache has shape {tuple(kv_cache.shape)}; expected [num_blocks, Hk, "
            f"{plan.block_size}, {width}]"
        )
    if kv_cache.stride()[1:] != (plan.block_size * width, width, 1):
        raise ValueError(
            f"{who}: kv_cache has strides {kv_cache.stride()}; dims 1 to 3 must be contiguous"
        )
