"""Context attention over static blocks: several queries of a request, causal.

Serves prompts, whole ones and chunks, and whatever lies behind a cached prefix: queries read
everything from the blocks, their own step's keys and values too, so that an answer does not depend
on where a prompt was cut. A program takes a tile of query tokens with all query heads of a KV head.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides
from csrc_triton.checks import check_tensor
from csrc_triton.decode import launch_options
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.static_blocks import (
    ChannelOrder,
    check_queries,
    kept_channels,
    make_layout,
    tile_tokens,
)
from csrc_triton.static_tiles import attend_static, gather_query
from think_vllm.plan.static_plan import StaticPlan

#: Query rows of a program, tokens times heads of a group, and tokens of a tile. Neither spills at
#: head sizes up to 256, quantized or not; what is fastest on a GPU has not been measured.
ROWS = 32
TILE = 32
OPTIONS = {"num_warps": 4}


def static_context(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_len: torch.Tensor,
    first: int,
    order: ChannelOrder,
    plan: StaticPlan,
    scale: float,
    out: torch.Tensor,
    max_query_len: int,
    logits_soft_cap: float = 0.0,
) -> None:
    """Attend with the last queries of requests, whose own keys and values are stored already.

    Args:
        query: ``[tokens, Hq, D]`` in the model's dtype; strides of dims 0 and 1 are free.
        kv_cache: As for ``store_static``.
        block_table: ``[m, W]`` int32 with ``m >= n``. Row ``r`` is that of request ``r``.
        query_start: ``[n + 1]`` int32. Start of each request's queries in ``query``; a request
            may have none.
        seq_len: ``[n]`` int32. Tokens that the last query of each request attends to.
        first: Requests before this one are left out.
        order: Of the layer.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[tokens, Hq, D]``. Written for the queries of requests ``first .. n - 1``.
        max_query_len: Most queries of any of them, a host number.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who = "static_context"
    check_queries(who, query, kv_cache, block_table, order, out, plan, scale)
    num_requests = seq_len.numel()
    check_tensor(who, "seq_len", seq_len, torch.int32, (num_requests,), query.device)
    check_tensor(who, "query_start", query_start, torch.int32, (num_requests + 1,), query.device)
    if block_table.shape[0] < num_requests or not 0 <= first <= num_requests:
        raise ValueError(
            f"{who}: block_table has {block_table.shape[0]} rows, first is {first}; expected "
            f"{num_requests} rows or more, and one of them or the next"
        )
    if first == num_requests or max_query_len == 0:
        return
    group = query.shape[1] // kv_cache.shape[1]
    rows = max(ROWS, triton.next_power_of_2(group))
    tiles = triton.cdiv(max_query_len * group, rows)
    static_context_kernel[(tiles, num_requests - first, kv_cache.shape[1])](
        query,
        cache_bytes(kv_cache),
        block_table,
        query_start,
        seq_len,
        order.keys,
        order.values,
        out,
        scale,
        logits_soft_cap,
        *row_strides(who, "query", query),
        *row_strides(who, "out", out),
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        first_request=first,
        ROWS=rows,
        G=group,
        TILE=tile_tokens(plan, TILE),
        CAPPED=logits_soft_cap > 0,
        L=make_layout(plan, query.dtype),
        **launch_options(OPTIONS, query.dtype),
    )


def aot_cases(plan: StaticPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads."""
    layout, options = make_layout(plan, dtype), launch_options(OPTIONS, dtype)
    constants = {"ROWS": ROWS, "G": 4, "TILE": tile_tokens(plan, TILE), "CAPPED": False}
    element = str(layout.DTYPE)
    pointers = {"query": element, "kv": "u8", "out": element}
    return [aot_case(static_context_kernel, constants | {"L": layout}, options, **pointers)]


# One binary whatever the batch and the model length: see ``decode.py``.
@kernel(unaligned=("table_ptr", "query_start_ptr", "seq_len_ptr"))
def static_context_kernel(
    query_ptr, kv_ptr, table_ptr, query_start_ptr, seq_len_ptr, key_order_ptr, value_order_ptr,
    out_ptr, scale, cap, query_stride, query_head_stride, out_stride, out_head_stride,
    table_stride, block_stride, head_stride, first_request,
    ROWS: tl.constexpr, G: tl.constexpr, TILE: tl.constexpr, CAPPED: tl.constexpr,
    L: tl.constexpr,
):  # fmt: skip
    """A tile of query rows of one request and KV head."""
    query_stride, query_head_stride = whole_stride(query_stride), whole_stride(query_head_stride)
    out_stride, out_head_stride = whole_stride(out_stride), whole_stride(out_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    tile, request, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request += first_request
    first_query = tl.load(query_start_ptr + request)
    num_queries = tl.load(query_start_ptr + request + 1) - first_query
    if tile * ROWS >= num_queries * G:
        return
    seq_len = tl.load(seq_len_ptr + request)
    rows = tile * ROWS + tl.arange(0, ROWS)
    token, head = rows // G, kv_head * G + rows % G
    row_mask = token < num_queries
    # Queries of a tile are neighbours: none sees behind the last one.
    end = tl.minimum(seq_len, seq_len - num_queries + (tile * ROWS + ROWS - 1) // G + 1)
    source = (first_query + token).to(tl.int64)
    query_at = query_ptr + (source * query_stride + head * query_head_stride)[:, None]
    _, total, sums = attend_static(
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
        tl.zeros((ROWS, L.V_PAD), tl.float32),
        gather_query(query_at, row_mask, key_order_ptr, kv_head, L),
        seq_len - num_queries + token,
        kv_ptr, table_ptr + request.to(tl.int64) * table_stride, kv_head, 0, end,
        scale, cap, block_stride, head_stride, TILE, CAPPED, L,
    )  # fmt: skip
    # Runs without requests, as vLLM warms up, may have queries that see nothing.
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    out = out_ptr + (source * out_stride + head * out_head_stride)[:, None]
    index = tl.arange(0, L.V_PAD)
    channel = kept_channels(value_order_ptr, kv_head, index, L.V, L.D)
    mask = row_mask[:, None] & (index < L.V)[None, :]
    tl.store(out + channel[None, :], sums.to(out_ptr.dtype.element_ty), mask=mask)
    if L.V < L.D:
        D_PAD: tl.constexpr = triton.next_power_of_2(L.D)
        index = tl.arange(0, D_PAD)
        pruned = (index >= L.V) & (index < L.D)
        channel = tl.load(value_order_ptr + kv_head * L.D + index, mask=pruned, other=0)
        zeros = tl.zeros((ROWS, D_PAD), out_ptr.dtype.element_ty)
        tl.store(out + channel[None, :], zeros, mask=row_mask[:, None] & pruned[None, :])
