"""Decode attention over thin and dense blocks (flash-decoding form).

The context of a row is cut into splits of whole blocks, all thin or all dense. One item is a
split of one KV head: scores of all its blocks, one softmax, outputs. The thread that ends the last
split of a (row, KV head) combines its splits. Splits depend on the row alone, so neither the
batch nor the number of threads changes a result by a single bit.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.kernels.cpu.attend import attend
from think_vllm.kernels.cpu.blocks import view_blocks
from think_vllm.kernels.cpu.checks import check_cache, check_query
from think_vllm.kernels.cpu.elements import flat_elements, flat_indices
from think_vllm.kernels.cpu.splits import Inputs, Sizes
from think_vllm.kernels.cpu.threads import choose_threads
from think_vllm.kernels.cpu.vectors import LANES
from think_vllm.plan.matrix_layout import align_up
from think_vllm.plan.planner import BlockPlan

#: Tokens of a split, in whole blocks: enough to hide its cost, few enough to balance.
SPLIT_TOKENS = 512


@dataclass(frozen=True)
class DecodeRows:
    """Query tokens of a batch, one per row."""

    #: ``[R]`` int32. Row of the block table that the query belongs to.
    request: npt.NDArray[np.int32]
    #: ``[R]`` int32. Tokens it attends to, its own included; 0 for padding.
    seq_len: npt.NDArray[np.int32]
    #: ``[R]`` int32. Spans at the start of its context that are thin.
    thin_spans: npt.NDArray[np.int32]


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    rows: DecodeRows,
    plan: BlockPlan,
    scale: float,
    out: torch.Tensor,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend with single query tokens to contexts of thin, then dense blocks.

    Source: ThinK, arXiv 2407.21018, section 3.3, with vLLM's paged cache.

    Args:
        query: ``[R, Hq, D]`` in the cache's dtype; stride of dim 0 is free.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]`` bf16, fp16 or fp32; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        rows: Which request and which part of its context each query sees.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[R, Hq, D]`` in the cache's dtype. Written in full, zeros where seq_len is 0.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]`` float. One more score per query head, with no value behind it (attention
            sinks of gpt-oss); None for none.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.

    Notes:
        All sums are float32; the weights of the softmax are not rounded.
    """
    who = "decode_attention"
    check_cache(who, kv_cache, block_table, plan)
    check_query(who, query, kv_cache.shape[1], plan.head_size)
    _check_rows(who, query, kv_cache, rows, out)
    seq_lens = flat_indices(rows.seq_len)
    threads = choose_threads(2 * int(seq_lens.sum()) * query.shape[1] * query.shape[2])
    attend(
        threads,
        Inputs(
            query=flat_elements(query),
            block_table=flat_elements(block_table),
            request=flat_indices(rows.request),
            seq_len=seq_lens,
            thin_spans=flat_indices(rows.thin_spans),
            sinks=flat_sinks(who, sinks, query.shape[1]),
        ),
        np.float32(scale),
        np.float32(logits_soft_cap),
        flat_elements(out),
        *view_blocks(kv_cache, block_table, plan),
        _sizes(query, kv_cache.shape[1], plan, out),
    )


def flat_sinks(who: str, sinks: torch.Tensor | None, num_heads: int) -> npt.NDArray[np.float32]:
    """Attention sinks as the kernel takes them: float32 [Hq], or [0] for none.

    Raises:
        ValueError: If they are not one for each query head.
    """
    if sinks is None:
        return np.empty(0, np.float32)
    if sinks.shape != (num_heads,):
        raise ValueError(
            f"{who}: sinks has shape {tuple(sinks.shape)}; expected one per query head, "
            f"({num_heads},)"
        )
    return np.ascontiguousarray(sinks.detach().float().numpy())


def _check_rows(
    who: str, query: torch.Tensor, kv_cache: torch.Tensor, rows: DecodeRows, out: torch.Tensor
) -> None:
    if query.dtype != kv_cache.dtype or out.dtype != kv_cache.dtype:
        raise ValueError(
            f"{who}: query is {query.dtype}, out is {out.dtype}, kv_cache is {kv_cache.dtype}; "
            "expected one dtype"
        )
    if out.shape != query.shape or out.stride()[1:] != query.stride()[1:]:
        raise ValueError(
            f"{who}: out has shape {tuple(out.shape)} and strides {out.stride()}, query "
            f"{tuple(query.shape)} and {query.stride()}; all but stride 0 must be equal"
        )
    for name in ("request", "seq_len", "thin_spans"):
        values = getattr(rows, name)
        if values.shape != query.shape[:1]:
            raise ValueError(
                f"{who}: rows.{name} has shape {values.shape}, query has {query.shape[0]} rows"
            )


def _sizes(query: torch.Tensor, num_kv_heads: int, plan: BlockPlan, out: torch.Tensor) -> Sizes:
    dense = align_up(plan.block_size, LANES)
    thin = align_up(plan.thin_block_tokens, LANES)
    dense_blocks, thin_blocks = max(1, SPLIT_TOKENS // dense), max(1, SPLIT_TOKENS // thin)
    return Sizes(
        group=query.shape[1] // num_kv_heads,
        query_stride=query.stride(0),
        out_stride=out.stride(0),
        thin_split_blocks=thin_blocks,
        dense_split_blocks=dense_blocks,
        split_columns=max(dense_blocks * dense, thin_blocks * thin),
    )
