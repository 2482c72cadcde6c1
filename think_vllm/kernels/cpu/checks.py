"""What launchers check before a kernel trusts its arguments."""

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.kernels.cpu.elements import CARRIERS
from think_vllm.kernels.cpu.vectors import LANES
from think_vllm.plan.planner import BlockPlan


def check_cache(
    who: str, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: BlockPlan
) -> None:
    """Check a cache and a block table against a plan.

    Args:
        who: The launcher, named in messages.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        block_table: ``[num_requests, W]`` int32.
        plan: How blocks are laid out.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if kv_cache.dim() != 4:
        raise ValueError(
            f"{who}: kv_cache has shape {tuple(kv_cache.shape)}; expected [num_blocks, Hk, N, 2D]"
        )
    if kv_cache.dtype not in CARRIERS or kv_cache.itemsize != plan.itemsize:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype}, plan.itemsize is {plan.itemsize}; "
            "expected bfloat16 or float16 with 2, float32 with 4"
        )
    block_size, width = kv_cache.shape[2:]
    if block_size != plan.block_size:
        raise ValueError(
            f"{who}: kv_cache.shape[2] is {block_size}, plan.block_size is {plan.block_size}; "
            "build the plan for the block size that the cache was allocated with"
        )
    if width != 2 * plan.head_size:
        raise ValueError(
            f"{who}: kv_cache.shape[3] is {width}, expected 2 * plan.head_size = "
            f"{2 * plan.head_size}"
        )
    if plan.head_size % LANES or plan.block_size % LANES:
        raise ValueError(
            f"{who}: head size {plan.head_size}, block size {plan.block_size}; "
            f"both must be multiples of {LANES}"
        )
    if kv_cache.stride()[1:] != (block_size * width, width, 1):
        raise ValueError(
            f"{who}: kv_cache has strides {kv_cache.stride()}; dims 1 to 3 must be contiguous "
            f"({block_size * width}, {width}, 1)"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"{who}: block_table is {block_table.dtype} {tuple(block_table.shape)} with strides "
            f"{block_table.stride()}; expected int32 [num_requests, W], rows contiguous"
        )
    if kv_cache.device.type != "cpu" or block_table.device.type != "cpu":
        raise ValueError(
            f"{who}: kv_cache is on {kv_cache.device}, block_table on {block_table.device}; "
            "expected the CPU"
        )


def check_query(who: str, query: torch.Tensor, num_kv_heads: int, head_size: int) -> None:
    """Check ``[tokens, Hq, D]`` queries (or outputs) against the KV heads.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if query.dim() != 3 or query.shape[2] != head_size:
        raise ValueError(
            f"{who}: query has shape {tuple(query.shape)}; expected [tokens, Hq, {head_size}]"
        )
    if query.shape[1] == 0 or query.shape[1] % num_kv_heads:
        raise ValueError(
            f"{who}: query has {query.shape[1]} heads, there are {num_kv_heads} KV heads; "
            "expected a positive multiple"
        )
    if query.stride()[1:] != (head_size, 1):
        raise ValueError(
            f"{who}: query has strides {query.stride()}; dims 1 and 2 must be contiguous "
            f"({head_size}, 1)"
        )
    if query.dtype not in CARRIERS:
        raise ValueError(f"{who}: query is {query.dtype}; expected bfloat16, float16 or float32")


def check_tasks(
    who: str, request: npt.NDArray[np.int32], other: npt.NDArray[np.int32], name: str
) -> None:
    """Check that two index arrays are ``[n]`` of one length.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if np.ndim(request) != 1 or np.shape(request) != np.shape(other):
        raise ValueError(
            f"{who}: request has shape {np.shape(request)}, {name} has {np.shape(other)}; "
            "expected [n] twice"
        )
