"""What launchers of every device check before a kernel trusts its arguments.

Shapes, strides and dtypes only, so nothing waits for a GPU. Every function takes ``who``, the
launcher, and raises a ``ValueError`` that says who, what was given and what is expected.
"""

import torch

from think_vllm.plan.planner import BlockPlan

#: Dtypes of models, and so of caches, keys, values and queries.
ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)


def check_blocks(who: str, kv_cache: torch.Tensor, plan: BlockPlan) -> None:
    """Check ``[num_blocks, Hk, N, 2 * D]``, whose stride 0 is free, against a plan."""
    if kv_cache.dim() != 4 or kv_cache.dtype not in ELEMENTS:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; expected bfloat16, "
            "float16 or float32 [num_blocks, Hk, N, 2 * D]"
        )
    width = 2 * plan.head_size
    if kv_cache.shape[2:] != (plan.block_size, width) or kv_cache.itemsize != plan.itemsize:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; the plan is for blocks "
            f"of [{plan.block_size}, {width}] elements of {plan.itemsize} bytes"
        )
    check_strides(who, kv_cache)


def check_strides(who: str, kv_cache: torch.Tensor) -> None:
    """Check that each block of a cache is contiguous."""
    rows, width = kv_cache.shape[2:]
    if kv_cache.stride()[1:] != (rows * width, width, 1):
        raise ValueError(
            f"{who}: kv_cache has strides {kv_cache.stride()}; dims 1 to 3 must be contiguous"
        )


def check_block_table(who: str, block_table: torch.Tensor) -> None:
    """Check ``[num_requests, W]`` int32, whose stride 0 is free."""
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"{who}: block_table is {block_table.dtype} {tuple(block_table.shape)} with strides "
            f"{block_table.stride()}; expected int32 [num_requests, W], rows contiguous"
        )


def check_cache(
    who: str, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: BlockPlan
) -> None:
    """Check a cache, its block table, and that both are on one device."""
    check_blocks(who, kv_cache, plan)
    check_block_table(who, block_table)
    if kv_cache.device != block_table.device:
        raise ValueError(
            f"{who}: kv_cache is on {kv_cache.device}, block_table on {block_table.device}"
        )


def check_group(who: str, num_heads: int, num_kv_heads: int) -> None:
    """Check that every KV head has as many query heads."""
    if num_heads == 0 or num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"{who}: query has {num_heads} heads, there are {num_kv_heads} KV heads; expected a "
            "positive multiple"
        )
