"""Views of static blocks, and gathering of channels."""

from dataclasses import dataclass

import torch

from think_vllm.plan.static_plan import StaticPlan


@dataclass(frozen=True)
class StaticParts:
    """Views of all blocks of a cache."""

    keys: torch.Tensor  # ``[B, Hk, C, N]``
    values: torch.Tensor  # ``[B, Hk, N, V]``
    key_scales: torch.Tensor  # float32 ``[B, Hk, N]``; without elements unless keys are quantized
    value_scales: torch.Tensor  # as ``key_scales``


def static_parts(kv_cache: torch.Tensor, plan: StaticPlan) -> StaticParts:
    """View the parts of a checked cache."""
    layout, runs = plan.layout, kv_cache.view(*kv_cache.shape[:2], -1)
    first = layout.keys_offset // kv_cache.itemsize
    end = layout.key_scales_offset // kv_cache.itemsize
    scales = runs[..., end:]
    of_keys = of_values = scales
    if plan.is_quantized:
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
