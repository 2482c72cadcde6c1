"""What launchers check, beside the checks of ``kernels/checks.py``, and in its terms."""

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.kernels import checks
from think_vllm.kernels.cpu.vectors import LANES
from think_vllm.plan.planner import BlockPlan


def check_cache(
    who: str, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: BlockPlan
) -> None:
    """Check what all devices need, and what CPUs do: whole vectors, in their memory."""
    checks.check_cache(who, kv_cache, block_table, plan)
    if plan.head_size % LANES or plan.block_size % LANES:
        raise ValueError(
            f"{who}: head size {plan.head_size}, block size {plan.block_size}; "
            f"both must be multiples of {LANES}"
        )
    if kv_cache.device.type != "cpu":
        raise ValueError(f"{who}: kv_cache is on {kv_cache.device}; expected the CPU")


def check_query(who: str, query: torch.Tensor, num_kv_heads: int, head_size: int) -> None:
    """Check ``[tokens, Hq, D]`` queries (or outputs) against the KV heads."""
    if query.dim() != 3 or query.shape[2] != head_size:
        raise ValueError(
            f"{who}: query has shape {tuple(query.shape)}; expected [tokens, Hq, {head_size}]"
        )
    checks.check_group(who, query.shape[1], num_kv_heads)
    if query.stride()[1:] != (head_size, 1):
        raise ValueError(
            f"{who}: query has strides {query.stride()}; dims 1 and 2 must be contiguous "
            f"({head_size}, 1)"
        )
    if query.dtype not in checks.ELEMENTS:
        raise ValueError(f"{who}: query is {query.dtype}; expected bfloat16, float16 or float32")


def check_tasks(
    who: str, request: npt.NDArray[np.int32], other: npt.NDArray[np.int32], name: str
) -> None:
    """Check that two index arrays are ``[n]`` of one length."""
    if np.ndim(request) != 1 or np.shape(request) != np.shape(other):
        raise ValueError(
            f"{who}: request has shape {np.shape(request)}, {name} has {np.shape(other)}; "
            "expected [n] twice"
        )
