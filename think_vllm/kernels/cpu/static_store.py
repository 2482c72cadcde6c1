"""Storing tokens in static blocks, in plain torch: gathers and scatters that torch does as well."""

from dataclasses import dataclass

import torch

from think_vllm.kernels.cpu.quantize import SMALLEST_NORMAL
from think_vllm.kernels.static_cache import StaticChannels, check_static_cache
from think_vllm.plan.formats import FP8_MAX
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


def quantize_tokens(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Code each row in e4m3 with a scale of its own; see ``reference.quantization.quantize_fp8``.

    Args:
        part: ``[tokens, heads, n]``.

    Returns:
        Codes, uint8 ``[tokens, heads, n]``, and scales, float32 ``[tokens, heads]``.
    """
    elements = part.float()
    scale = elements.abs().amax(dim=2) / FP8_MAX
    scale = torch.where(scale.isnan(), torch.nan, scale)  # one bit pattern for every NaN
    scale = torch.where(scale < float(SMALLEST_NORMAL), 0.0, scale)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    scaled = (elements * inverse[..., None]).nan_to_num(0.0, posinf=FP8_MAX, neginf=-FP8_MAX)
    codes = scaled.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, scale


def read_back(part: torch.Tensor, kept: torch.Tensor, plan: StaticPlan) -> torch.Tensor:
    """What tokens are once they have been stored and read: whole heads, pruned channels zero.

    Args:
        part: ``[tokens, Hk, D]``. Keys or values.
        kept: ``[Hk, n]`` int64. Their kept channels.
        plan: Whether they are quantized.

    Returns:
        ``[tokens, Hk, D]`` in the dtype of ``part``.
    """
    index = kept.expand(part.shape[0], *kept.shape)
    gathered = part.gather(2, index)
    if plan.is_quantized:
        codes, scale = quantize_tokens(gathered)
        floats = codes.view(torch.float8_e4m3fn).float() * scale[..., None]
        gathered = floats.to(part.dtype)
    return torch.zeros_like(part).scatter_(2, index, gathered)


def store_static(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: torch.Tensor,
    channels: StaticChannels,
    plan: StaticPlan,
) -> None:
    """Store the kept channels of tokens.

    Args:
        key: ``[tokens, Hk, D]`` in the model's dtype. Tokens behind those of ``slots`` are padding.
        value: ``[tokens, Hk, D]``, as ``key``.
        kv_cache: ``[num_blocks, Hk, N, C + V]`` in the model's dtype; in fp8 uint8 ``[num_blocks,
            Hk, N, C + V + 8]``. Stride of dim 0 is free. Written.
        slots: ``[tokens]`` int64. A token's block times ``N`` plus its place there; negative for
            none.
        channels: Of the layer.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "store_static"
    check_static_cache(who, kv_cache, key.dtype, plan)
    for name, given in (("key", key), ("value", value)):
        expected = (kv_cache.shape[1], plan.head_size)
        if given.shape[1:] != expected or given.dtype != key.dtype:
            raise ValueError(
                f"{who}: {name} is {given.dtype} {tuple(given.shape)}; expected {key.dtype} "
                f"[tokens, {expected[0]}, {expected[1]}]"
            )
    count = slots.shape[0]
    if min(key.shape[0], value.shape[0]) < count:
        raise ValueError(f"{who}: {count} slots for {key.shape[0]} keys, {value.shape[0]} values")
    key, value = key[:count], value[:count]
    if count and int(slots.min()) < 0:
        stored = slots >= 0
        key, value, slots = key[stored], value[stored], slots[stored]
    block = torch.div(slots, plan.block_size, rounding_mode="floor")
    place = slots - block * plan.block_size
    parts = static_parts(kv_cache, plan)
    kept_keys = gather_channels(key, channels.keys) if plan.prunes_keys else key
    kept_values = gather_channels(value, channels.values) if plan.prunes_values else value
    if plan.is_quantized:
        kept_keys, scales = quantize_tokens(kept_keys)
        parts.key_scales[block, :, place] = scales
        kept_values, scales = quantize_tokens(kept_values)
        parts.value_scales[block, :, place] = scales
    parts.keys[block, :, :, place] = kept_keys
    parts.values[block, :, place] = kept_values
