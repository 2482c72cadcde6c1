"""Energies of channels: what ``think_vllm/worker/policies.py`` makes scores of.

Source: ThinK, arXiv 2407.21018, section 3.2: a key channel scores the norm of its observed queries
times the norm of its keys. Means of squares rank channels alike; with grouped queries the
mean runs over the heads of the group as well. A value channel scores the norm of the observed
queries' outputs; see ``kernels/reference/scoring.py``.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numba import njit, prange

from think_vllm.kernels.cpu.checks import check_cache, check_query, check_tasks
from think_vllm.kernels.cpu.compiling import kernel
from think_vllm.kernels.cpu.elements import element_to_float32, flat_elements, flat_indices
from think_vllm.kernels.cpu.threads import choose_threads, fetch_add
from think_vllm.plan.planner import BlockPlan


class _KeyShape(NamedTuple):
    """What the kernel needs to know, all int64. Offsets and strides count elements."""

    kv_heads: int
    head_size: int
    block_size: int
    table_stride: int
    block_stride: int
    run: int


def key_energy(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: npt.NDArray[np.int32],
    prompt_len: npt.NDArray[np.int32],
    plan: BlockPlan,
    first_block: npt.NDArray[np.int32] | None = None,
) -> torch.Tensor:
    """Average each channel's squared keys over the dense blocks of prompts.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        prompt_len: ``[n]`` int32. Tokens of the prompt, at least one of them in a dense block.
        plan: How blocks are laid out.
        first_block: ``[n]`` int32. First dense block; those before it are left out. None for 0.

    Returns:
        ``[n, Hk, D]`` float32.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "key_energy"
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, prompt_len, "prompt_len")
    if first_block is None:
        first_block = np.zeros_like(request)
    check_tasks(who, request, first_block, "first_block")
    lengths = flat_indices(prompt_len)
    num_kv_heads = kv_cache.shape[1]
    energy = torch.zeros(len(lengths), num_kv_heads, plan.head_size, dtype=torch.float32)
    if len(lengths) == 0:
        return energy
    shape = _KeyShape(
        kv_heads=num_kv_heads,
        head_size=plan.head_size,
        block_size=plan.block_size,
        table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0),
        run=kv_cache.stride(1),
    )
    _key_energy(
        choose_threads(int(lengths.sum()) * num_kv_heads * plan.head_size),
        flat_elements(kv_cache),
        flat_elements(block_table),
        flat_indices(request),
        flat_indices(first_block),
        lengths,
        flat_elements(energy),
        shape,
    )
    return energy


def add_query_energy(query: torch.Tensor, begin: int, end: int, energy: torch.Tensor) -> None:
    """Add tokens ``begin .. end - 1`` to the energy of an observation window.

    Tokens are added in order, so a window that arrives in chunks adds up to the same bits.

    Args:
        query: ``[tokens, Hq, D]`` bf16, fp16 or fp32; stride of dim 0 is free. Queries; or the
            outputs of attention, for value channels.
        begin: First token.
        end: Token behind the last.
        energy: ``[Hk, D]`` float32, contiguous. Gains per token the mean over the heads of a
            group of the squared queries.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "add_query_energy"
    if energy.dim() != 2 or energy.dtype != torch.float32 or not energy.is_contiguous():
        raise ValueError(
            f"{who}: energy is {energy.dtype} {tuple(energy.shape)} with strides "
            f"{energy.stride()}; expected contiguous float32 [Hk, D]"
        )
    num_kv_heads, head_size = energy.shape
    check_query(who, query, num_kv_heads, head_size)
    if not 0 <= begin <= end <= query.shape[0]:
        raise ValueError(
            f"{who}: tokens {begin} to {end} of {query.shape[0]}; expected an ordered range inside"
        )
    _add_query_energy(
        flat_elements(query),
        query.stride(0),
        begin,
        end,
        flat_elements(energy),
        num_kv_heads,
        query.shape[1] // num_kv_heads,
        head_size,
    )


@kernel(parallel=True)
def _key_energy(threads, kv, table, request, first_block, lengths, energy, shape):
    counters = np.zeros(1, np.int64)
    for _ in prange(threads):
        _work(kv, table, request, first_block, lengths, energy, shape, counters)


@njit
def _work(kv, table, request, first_block, lengths, energy, shape, counters):
    """Draw (prompt, KV head) items until there are none left."""
    num_items = len(request) * shape.kv_heads
    N, D = shape.block_size, shape.head_size
    item = fetch_add(counters, 0)
    while item < num_items:
        prompt, kv_head = item // shape.kv_heads, item % shape.kv_heads
        length = np.int64(lengths[prompt])
        first = np.int64(first_block[prompt])
        for b in range(first, (length + N - 1) // N):
            block = np.int64(table[request[prompt] * shape.table_stride + b])
            run = block * shape.block_stride + kv_head * shape.run
            count = min(N, length - b * N)
            for c in range(D):
                energy[item * D + c] += _sum_squares(kv, run + c * N, count)
        for c in range(D):
            energy[item * D + c] /= np.float32(max(length - first * N, 1))
        item = fetch_add(counters, 0)


@njit(fastmath={"reassoc", "contract", "nsz"})
def _sum_squares(kv, start, count):
    # A slice, because an index that might be negative would keep LLVM from vectorizing.
    elements, total = kv[start : start + count], np.float32(0.0)
    for x in range(count):
        value = element_to_float32(elements[x])
        total += value * value
    return total


@kernel()
def _add_query_energy(query, query_stride, begin, end, energy, kv_heads, group, head_size):
    squares = np.empty(head_size, np.float32)
    for token in range(begin, end):
        for kv_head in range(kv_heads):
            squares[:] = np.float32(0.0)
            for head in range(kv_head * group, (kv_head + 1) * group):
                start = token * query_stride + head * head_size
                for d in range(head_size):
                    value = element_to_float32(query[start + d])
                    squares[d] += value * value
            for d in range(head_size):
                energy[kv_head * head_size + d] += squares[d] / np.float32(group)
