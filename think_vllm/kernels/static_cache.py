"""Static blocks as kernels of every device see them: channels of a layer, and what a cache is."""

from dataclasses import dataclass

import torch

from think_vllm.kernels.checks import ELEMENTS, check_strides
from think_vllm.plan.static_plan import StaticPlan


@dataclass(frozen=True)
class StaticChannels:
    """Kept channels of a layer."""

    keys: torch.Tensor  # ``[Hk, C]`` int64, ascending per head
    values: torch.Tensor  # ``[Hk, V]`` int64, ascending per head


def check_static_cache(
    who: str, kv_cache: torch.Tensor, dtype: torch.dtype, plan: StaticPlan
) -> None:
    """Check a cache against a plan and a model's dtype.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if dtype not in ELEMENTS or dtype.itemsize != plan.itemsize:
        raise ValueError(
            f"{who}: keys and queries are {dtype}, plan.itemsize is {plan.itemsize}; "
            "expected bfloat16 or float16 with 2, float32 with 4"
        )
    stored = torch.uint8 if plan.is_quantized else dtype
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
    check_strides(who, kv_cache)
