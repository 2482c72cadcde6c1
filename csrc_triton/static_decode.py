"""Decode attention over static blocks, in the form of ``decode.py``: splits, then their sum."""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides
from csrc_triton.checks import check_tensor
from csrc_triton.decode import launch_options
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.splits import (
    MAX_SPLITS,
    choose_splits,
    combine_splits,
    count_multiprocessors,
    make_workspace,
)
from csrc_triton.static_blocks import ChannelOrder, check_queries, make_layout, tile_tokens
from csrc_triton.static_tiles import attend_static, gather_query
from think_vllm.plan.static_plan import StaticPlan

#: Tokens of a tile. Codes need more registers: with more of them, some would spill.
PLAIN_TILE = 64
QUANTIZED_TILE = 32
#: Rows of ``tl.dot`` operands: a group of fewer query heads is padded.
MIN_GROUP = 16
OPTIONS = {"num_warps": 4}
#: Programs that a multiprocessor holds, by their registers.
PROGRAMS = 4


def static_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_len: torch.Tensor,
    order: ChannelOrder,
    plan: StaticPlan,
    scale: float,
    out: torch.Tensor,
    logits_soft_cap: float = 0.0,
    workspace: torch.Tensor | None = None,
    max_context: int | None = None,
) -> None:
    """Attend with one query of each request, whose own key and value are stored already.

    Source: ThinK, arXiv 2407.21018, section 3.3, with channels that do not depend on the prompt.

    Args:
        query: ``[R, Hq, D]`` in the model's dtype; strides of dims 0 and 1 are free.
        kv_cache: As for ``store_static``.
        block_table: ``[n, W]`` int32 with ``n >= R``. Row ``r`` is that of query ``r``.
        seq_len: ``[R]`` int32. Tokens that the query attends to; 0 for padding.
        order: Of the layer.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[R, Hq, D]``. Written in full, zeros where ``seq_len`` is 0.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        workspace: Of ``make_workspace`` with head size V, for at least R rows. None makes one.
        max_context: Longest context, for the number of splits; None takes the block table's width.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who = "static_decode"
    check_queries(who, query, kv_cache, block_table, order, out, plan, scale)
    num_rows, num_heads, _ = query.shape
    check_tensor(who, "seq_len", seq_len, torch.int32, (num_rows,), query.device)
    if block_table.shape[0] < num_rows:
        raise ValueError(f"{who}: block_table has {block_table.shape[0]} rows for {num_rows}")
    if num_rows == 0:
        return
    num_kv_heads = kv_cache.shape[1]
    if workspace is None:
        longest = max_context or block_table.shape[1] * plan.block_size
        splits = choose_splits(
            num_rows, num_kv_heads, longest, count_multiprocessors(query.device), PROGRAMS
        )
        workspace = make_workspace(num_rows, num_heads, plan.value_channels, splits, query.device)
    splits = workspace.shape[2]
    if workspace.shape[0] < num_rows or workspace.shape[3] != plan.value_channels + 2:
        raise ValueError(
            f"{who}: workspace is {tuple(workspace.shape)}; expected [{num_rows} or more, "
            f"{num_heads}, splits, {plan.value_channels + 2}]"
        )
    group = num_heads // num_kv_heads
    static_decode_kernel[(num_rows, num_kv_heads, splits)](
        query,
        cache_bytes(kv_cache),
        block_table,
        seq_len,
        order.keys,
        workspace,
        scale,
        logits_soft_cap,
        *row_strides(who, "query", query),
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        splits=splits,
        ROWS=max(MIN_GROUP, triton.next_power_of_2(group)),
        G=group,
        TILE=_tile(plan),
        CAPPED=logits_soft_cap > 0,
        L=make_layout(plan, query.dtype),
        **launch_options(OPTIONS, query.dtype),
    )
    static_combine_kernel[(num_rows, num_heads)](
        workspace,
        seq_len,
        order.values,
        out,
        *row_strides(who, "out", out),
        splits,
        SPLITS_PAD=max(MAX_SPLITS, triton.next_power_of_2(splits)),
        **_combine_constants(plan, group),
        num_warps=1,
    )


def _tile(plan: StaticPlan) -> int:
    return tile_tokens(plan, QUANTIZED_TILE if plan.is_quantized else PLAIN_TILE)


def _combine_constants(plan: StaticPlan, group: int) -> dict[str, int]:
    padded = triton.next_power_of_2(plan.head_size)
    return {"G": group, "D": plan.head_size, "D_PAD": padded, "V": plan.value_channels}


def aot_cases(plan: StaticPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads."""
    layout, options = make_layout(plan, dtype), launch_options(OPTIONS, dtype)
    attend = {"G": 4, "ROWS": MIN_GROUP, "TILE": _tile(plan), "CAPPED": False, "L": layout}
    combine = {"SPLITS_PAD": MAX_SPLITS, **_combine_constants(plan, 4)}
    element = str(layout.DTYPE)
    pointers = {"query": element, "kv": "u8", "partial": "fp32", "out": element}
    return [
        aot_case(static_decode_kernel, attend, options, **pointers),
        aot_case(static_combine_kernel, combine, {"num_warps": 1}, **pointers),
    ]


# One binary whatever the batch and the model length: see ``decode.py``.
@kernel(unaligned=("table_ptr", "seq_len_ptr"))
def static_decode_kernel(
    query_ptr, kv_ptr, table_ptr, seq_len_ptr, order_ptr, partial_ptr,
    scale, cap, query_stride, query_head_stride, table_stride, block_stride, head_stride, splits,
    G: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head: sums [G, V], maxima and totals [G]."""
    query_stride, query_head_stride = whole_stride(query_stride), whole_stride(query_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_len_ptr + row)
    per_split = tl.cdiv(tl.cdiv(seq_len, TILE), splits) * TILE
    begin = split * per_split
    heads = tl.arange(0, ROWS)
    head_mask = heads < G
    query_at = query_ptr + row.to(tl.int64) * query_stride
    query_at += (kv_head * G + heads)[:, None] * query_head_stride
    top, total, sums = attend_static(
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, L.V_PAD), tl.float32),
        gather_query(query_at, head_mask, order_ptr, kv_head, L),
        tl.zeros((ROWS,), tl.int32) + seq_len - 1,
        kv_ptr, table_ptr + row.to(tl.int64) * table_stride, kv_head,
        begin, tl.minimum(begin + per_split, seq_len),
        scale, cap, block_stride, head_stride, TILE, CAPPED, L,
    )  # fmt: skip
    head = (row.to(tl.int64) * tl.num_programs(1) + kv_head) * G + heads
    partial = partial_ptr + (head * splits + split) * (L.V + 2)
    channels = tl.arange(0, L.V_PAD)
    mask = head_mask[:, None] & (channels < L.V)[None, :]
    tl.store(partial[:, None] + channels[None, :], sums, mask=mask)
    tl.store(partial + L.V, top, mask=head_mask)
    tl.store(partial + L.V + 1, total, mask=head_mask)


@kernel(unaligned=("seq_len_ptr",))
def static_combine_kernel(
    partial_ptr, seq_len_ptr, order_ptr, out_ptr, out_stride, out_head_stride, splits,
    SPLITS_PAD: tl.constexpr, G: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    V: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row and query head, and scatter: pruned channels become zeros."""
    out_stride, out_head_stride = whole_stride(out_stride), whole_stride(out_head_stride)
    row, head = tl.program_id(0), tl.program_id(1)
    index = tl.arange(0, D_PAD)
    first = (row.to(tl.int64) * tl.num_programs(1) + head) * splits
    result = combine_splits(partial_ptr + first * (V + 2), splits, V, D_PAD, SPLITS_PAD)
    result = tl.where(tl.load(seq_len_ptr + row) > 0, result, 0.0)
    channel = tl.load(order_ptr + head // G * D + index, mask=index < D, other=0)
    out = out_ptr + row.to(tl.int64) * out_stride + head * out_head_stride + channel
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=index < D)
