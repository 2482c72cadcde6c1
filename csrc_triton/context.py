"""Context attention: several queries of a request, causal, over thin and dense blocks.

For chunks of a prompt whose earlier chunks are in the cache. A program takes a tile of query
tokens with all query heads of one KV head. Prompt queries see dense blocks alone as a rule; thin
ones come first where a prompt goes on from a compacted prefix.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides
from csrc_triton.checks import check_attention, check_tensor
from csrc_triton.decode import attention_layout, launch_options
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.tiles import attend_dense, attend_thin, span_tiles
from think_vllm.kernels.checks import check_cache
from think_vllm.plan.formats import Encoding
from think_vllm.plan.planner import BlockPlan

#: Queries of a program: tokens times heads of a group. Tiles of 2-bit keys leave fewer registers.
QUERIES = 32
INT2_QUERIES = 16
#: Tokens of a tile of dense blocks.
DENSE_TILE = 32
OPTIONS = {"num_warps": 4, "maxnreg": 255}


def context_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start: torch.Tensor,
    seq_len: torch.Tensor,
    request: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    out: torch.Tensor,
    max_query_len: int,
    logits_soft_cap: float = 0.0,
    thin_spans: torch.Tensor | None = None,
) -> None:
    """Attend with the last queries of requests, whose own keys and values are stored already.

    Args:
        query: ``[tokens, Hq, D]`` in the cache's dtype; strides of dims 0 and 1 are free.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        query_start: ``[n + 1]`` int32. Start of each request's queries in ``query``.
        seq_len: ``[n]`` int32. Tokens that the last query of each request attends to.
        request: ``[n]`` int32. Row of the block table.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[tokens, Hq, D]``. Written for the queries that ``query_start`` covers.
        max_query_len: Most queries of a request, a host number.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        thin_spans: ``[n]`` int32. Spans at the start of each context that are thin, all of them
            before the first query; None for none.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "context_attention"
    check_cache(who, kv_cache, block_table, plan)
    check_attention(who, query, kv_cache.shape[1], plan.head_size, kv_cache.dtype, out, scale)
    num_requests = request.shape[0]
    has_thin = thin_spans is not None
    thin_spans = thin_spans if has_thin else seq_len
    check_tensor(who, "query_start", query_start, torch.int32, (num_requests + 1,), query.device)
    for name, values in (("request", request), ("seq_len", seq_len), ("thin_spans", thin_spans)):
        check_tensor(who, name, values, torch.int32, (num_requests,), query.device)
    if num_requests == 0 or max_query_len == 0:
        return
    group = query.shape[1] // kv_cache.shape[1]
    queries = count_queries(plan)
    tiles = triton.cdiv(max_query_len * group, queries)
    _attend[(tiles, num_requests, kv_cache.shape[1])](
        query,
        cache_bytes(kv_cache),
        block_table,
        query_start,
        seq_len,
        request,
        thin_spans,
        out,
        scale,
        logits_soft_cap,
        *row_strides(who, "query", query),
        *row_strides(who, "out", out),
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        HAS_THIN=has_thin,
        L=attention_layout(plan, kv_cache.dtype, group, queries, DENSE_TILE, logits_soft_cap > 0),
        **launch_options(OPTIONS, kv_cache.dtype),
    )


def count_queries(plan: BlockPlan) -> int:
    """Queries of a program."""
    return INT2_QUERIES if plan.format.keys is Encoding.INT2 else QUERIES


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads, thin spans or none."""
    layout = attention_layout(plan, dtype, 4, count_queries(plan), DENSE_TILE, False)
    element, options = str(layout.DTYPE), launch_options(OPTIONS, dtype)
    pointers = {"query": element, "kv": "u8", "out": element}
    return [
        aot_case(_attend, {"L": layout, "HAS_THIN": thin}, options, **pointers)
        for thin in (False, True)
    ]


@kernel(unaligned=("table_ptr", "query_start_ptr", "seq_len_ptr", "request_ptr", "thin_spans_ptr"))
def _attend(
    query_ptr, kv_ptr, table_ptr, query_start_ptr, seq_len_ptr, request_ptr, thin_spans_ptr,
    out_ptr, scale, cap, query_stride, query_head_stride, out_stride, out_head_stride,
    table_stride, block_stride, head_stride,
    HAS_THIN: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one request and KV head."""
    query_stride, query_head_stride = whole_stride(query_stride), whole_stride(query_head_stride)
    out_stride, out_head_stride = whole_stride(out_stride), whole_stride(out_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    tile, index, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start_ptr + index)
    num_queries = tl.load(query_start_ptr + index + 1) - first_query
    if tile * L.QUERIES >= num_queries * L.G:
        return
    seq_len = tl.load(seq_len_ptr + index)
    queries = tile * L.QUERIES + tl.arange(0, L.QUERIES)
    token, head = queries // L.G, kv_head * L.G + queries % L.G
    query_mask = token < num_queries
    position = seq_len - num_queries + token
    # Queries of a tile are neighbours: none sees behind the last one.
    last = (tile * L.QUERIES + L.QUERIES - 1) // L.G
    end = tl.minimum(seq_len, seq_len - num_queries + last + 1)
    table = table_ptr + tl.load(request_ptr + index).to(tl.int64) * table_stride
    source = (first_query + token).to(tl.int64)
    query_at = query_ptr + source * query_stride + head * query_head_stride

    top = tl.full((L.QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((L.QUERIES,), tl.float32)
    sums = tl.zeros((L.D_PAD, L.QUERIES), tl.float32)
    begin = 0
    if HAS_THIN:
        thin_spans = tl.load(thin_spans_ptr + index)
        begin = thin_spans * (L.SPAN * L.N)
        top, total, sums = attend_thin(
            top, total, sums, query_at, query_mask, kv_ptr, table, kv_head,
            0, thin_spans * span_tiles(L), scale, cap, block_stride, head_stride, L,
        )  # fmt: skip
    top, total, sums = attend_dense(
        top, total, sums, query_at, query_mask, position, kv_ptr, table, kv_head,
        begin, end, scale, cap, block_stride, head_stride, L,
    )  # fmt: skip
    channels = tl.arange(0, L.D_PAD)
    out = out_ptr + (source * out_stride + head * out_head_stride)[None, :] + channels[:, None]
    mask = query_mask[None, :] & (channels < L.D)[:, None]
    sums = sums / tl.where(query_mask, total, 1.0)[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
