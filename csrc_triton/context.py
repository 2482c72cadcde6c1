"""Context attention: several queries of a request, causal, over thin and dense blocks.

For chunks of a prompt whose earlier chunks are in the cache. A program takes a tile of query
tokens with all query heads of one KV head. Prompt queries see dense blocks alone as a rule; thin
ones come first where a prompt goes on from a compacted prefix.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase
from csrc_triton.blocks import cache_bytes, cache_strides, check_cache, element_type
from csrc_triton.decode import attention_constants, check_rows, launch_options
from csrc_triton.matrices import in_order, output_parts
from csrc_triton.tiles import attend_dense, attend_thin
from think_vllm.planner import BlockPlan

#: Query rows of a program: tokens times heads of a group.
ROWS = 32
OPTIONS = {"num_warps": 4}
#: The same where thin blocks are read too, whose codes need the registers.
THIN_ROWS = 16
THIN_OPTIONS = {"num_warps": 4}


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
    check_rows(who, query, kv_cache, out)
    num_requests = request.shape[0]
    expected = {"query_start": num_requests + 1, "seq_len": num_requests, "request": num_requests}
    given = {"query_start": query_start, "seq_len": seq_len, "request": request}
    if thin_spans is not None:
        given["thin_spans"], expected["thin_spans"] = thin_spans, num_requests
    for name, values in given.items():
        if values.shape != (expected[name],) or values.dtype != torch.int32:
            raise ValueError(
                f"{who}: {name} is {values.dtype} {tuple(values.shape)}; expected int32 "
                f"[{expected[name]}]"
            )
    if num_requests == 0 or max_query_len == 0:
        return
    group = query.shape[1] // kv_cache.shape[1]
    has_thin = thin_spans is not None
    rows = max(THIN_ROWS if has_thin else ROWS, triton.next_power_of_2(group))
    tiles = triton.cdiv(max_query_len * group, rows)
    _attend[(tiles, num_requests, kv_cache.shape[1])](
        query,
        cache_bytes(kv_cache),
        block_table,
        query_start,
        seq_len,
        request,
        thin_spans if has_thin else seq_len,
        out,
        scale,
        logits_soft_cap,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        **cache_strides(kv_cache),
        HAS_THIN=has_thin,
        ROWS=rows,
        **attention_constants(plan, kv_cache.dtype, group, logits_soft_cap > 0),
        **launch_options(THIN_OPTIONS if has_thin else OPTIONS, kv_cache.dtype),
    )


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads, thin spans or none."""
    element = str(element_type(dtype))
    pointers = {"query_ptr": element, "kv_ptr": "u8", "table_ptr": "i32", "query_start_ptr": "i32",
                "seq_len_ptr": "i32", "request_ptr": "i32", "thin_spans_ptr": "i32",
                "out_ptr": element}  # fmt: skip
    signature = {name: f"*{kind}:16" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("scale", "cap"), "fp32")
    strides = ("query_stride", "query_head_stride", "out_stride", "out_head_stride",
               "block_stride", "head_stride")  # fmt: skip
    signature |= dict.fromkeys(strides, "i32:16") | {"table_stride": "i32"}
    constants = attention_constants(plan, dtype, 4, False)
    dense, thin = {"HAS_THIN": False, "ROWS": ROWS}, {"HAS_THIN": True, "ROWS": THIN_ROWS}
    return [
        AotCase(_attend, signature, constants | dense, launch_options(OPTIONS, dtype)),
        AotCase(_attend, signature, constants | thin, launch_options(THIN_OPTIONS, dtype)),
    ]


@triton.jit
def _attend(
    query_ptr, kv_ptr, table_ptr, query_start_ptr, seq_len_ptr, request_ptr, thin_spans_ptr,
    out_ptr, scale, cap, query_stride, query_head_stride, out_stride, out_head_stride,
    table_stride, block_stride, head_stride,
    HAS_THIN: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr,
    C_PAD: tl.constexpr, V_PAD: tl.constexpr, TILE: tl.constexpr,
    DENSE_TILE: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, THIN: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr,
    KEY_ROW: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_ROW: tl.constexpr, VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr, TABLE: tl.constexpr, V: tl.constexpr, VALUE_TABLE: tl.constexpr,
):  # fmt: skip
    """A tile of query rows of one request and KV head."""
    tile, index, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query = tl.load(query_start_ptr + index)
    num_queries = tl.load(query_start_ptr + index + 1) - first_query
    if tile * ROWS >= num_queries * G:
        return
    seq_len = tl.load(seq_len_ptr + index)
    rows = tile * ROWS + tl.arange(0, ROWS)
    token, head = rows // G, kv_head * G + rows % G
    row_mask = token < num_queries
    position = seq_len - num_queries + token
    # Queries of a tile are neighbours: nobody sees behind the last one.
    end = tl.minimum(seq_len, seq_len - num_queries + (tile * ROWS + ROWS - 1) // G + 1)
    table = table_ptr + tl.load(request_ptr + index).to(tl.int64) * table_stride
    source = (first_query + token).to(tl.int64)
    query_at = query_ptr + (source * query_stride + head * query_head_stride)[:, None]

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D_PAD), tl.float32)
    begin = 0
    if HAS_THIN:
        thin_spans = tl.load(thin_spans_ptr + index)
        begin = thin_spans * SPAN
        top, total, sums = attend_thin(
            top, total, sums, query_at, row_mask, kv_ptr, table, kv_head, 0, thin_spans * THIN,
            scale, cap, block_stride, head_stride,
            C_PAD, V_PAD, D_PAD, TILE, DTYPE, DOT, PRECISION, CAPPED,
            D, N, SPAN, THIN, T, C, KEY_BITS, VALUE_BITS, GROUP, KEY_ROW, KEY_SCALES, KEY_ZEROS,
            VALUES, VALUE_ROW, VALUE_SCALES, VALUE_ZEROS, TABLE, V, VALUE_TABLE,
        )  # fmt: skip
        if output_parts(VALUE_BITS, VALUE_TABLE) > 1:
            sums = in_order(sums, output_parts(VALUE_BITS, VALUE_TABLE))
    top, total, sums = attend_dense(
        top, total, sums, query_at, row_mask, position, kv_ptr, table, kv_head,
        begin, tl.cdiv(end, N), end, scale, cap, block_stride, head_stride,
        D_PAD, DENSE_TILE, DTYPE, DOT, PRECISION, CAPPED, D, N,
    )  # fmt: skip
    channels = tl.arange(0, D_PAD)
    out = out_ptr + (source * out_stride + head * out_head_stride)[:, None] + channels[None, :]
    mask = row_mask[:, None] & (channels < D)[None, :]
    sums = sums / tl.where(row_mask, total, 1.0)[:, None]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)
