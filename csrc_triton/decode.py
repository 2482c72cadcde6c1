"""Decode attention over thin and dense blocks (flash-decoding form).

A program is one warp. It takes one row, up to 16 query heads of one KV head and one split of the
context, and reads every key and value of it once for all of these heads. A split is a share of the
thin tiles and a share of the dense tokens, so all splits of a row have equal work. Splits share a
softmax through a second kernel.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import Layout, cache_bytes, cache_strides, make_layout
from csrc_triton.checks import check_attention, check_tensor
from csrc_triton.dots import dot_type
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.softmax import BOOST, LOG2E
from csrc_triton.splits import (
    choose_splits,
    combine,
    combine_case,
    count_multiprocessors,
    make_workspace,
)
from csrc_triton.tiles import attend_dense, attend_thin, span_tiles
from think_vllm.kernels.checks import check_cache
from think_vllm.plan.formats import Encoding
from think_vllm.plan.planner import BlockPlan

#: Query heads of a program: 8 is the narrowest product of tensor cores.
MIN_QUERIES = 8
MAX_QUERIES = 16
#: Tokens of a tile of keys as computed, and of dense blocks: more would take more registers.
PLAIN_TILE = 32
DENSE_TILE = 16
#: Registers are limited so that three programs share a quarter of a multiprocessor. Pruned values
#: have two sums, 2-bit keys tiles of 128 tokens, and heads wider than 128 need two warps.
OPTIONS = {"num_warps": 1, "num_stages": 1, "maxnreg": 168}
LARGE_OPTIONS = OPTIONS | {"maxnreg": 255}
WIDE_OPTIONS = LARGE_OPTIONS | {"num_warps": 2}
#: Warps that a multiprocessor holds, by the registers of one: in quarters of 16,384 each.
WARPS = {168: 12, 255: 8}


def decode_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    seq_len: torch.Tensor,
    thin_spans: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    out: torch.Tensor,
    logits_soft_cap: float = 0.0,
    workspace: torch.Tensor | None = None,
    max_context: int | None = None,
) -> None:
    """Attend with single query tokens to contexts of thin, then dense blocks.

    Source: ThinK, arXiv 2407.21018, section 3.3; KIVI, arXiv 2402.02750, for integer codes.

    Args:
        query: ``[R, Hq, D]`` in the cache's dtype; strides of dims 0 and 1 are free.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        request: ``[R]`` int32. Row of the block table.
        seq_len: ``[R]`` int32. Tokens that the query attends to; 0 for padding.
        thin_spans: ``[R]`` int32. Spans at the start of its context that are thin.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[R, Hq, D]``. Written in full, zeros where ``seq_len`` is 0.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        workspace: Of ``make_workspace``, for at least R rows; its splits are used.
            None makes one.
        max_context: Longest context, for the number of splits; None takes the block table's width.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "decode_attention"
    check_cache(who, kv_cache, block_table, plan)
    check_attention(who, query, kv_cache.shape[1], plan.head_size, kv_cache.dtype, out, scale)
    for name, values in (("request", request), ("seq_len", seq_len), ("thin_spans", thin_spans)):
        check_tensor(who, name, values, torch.int32, query.shape[:1], query.device)
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    if num_rows == 0:
        return
    if workspace is None:
        longest = max_context or block_table.shape[1] * plan.block_size
        splits = decode_splits(num_rows, num_heads, num_kv_heads, longest, plan, query.device)
        workspace = make_workspace(num_rows, num_heads, head_size, splits, query.device)
    splits = workspace.shape[2]
    if splits < 1 or workspace.shape[0] < num_rows:
        raise ValueError(
            f"{who}: workspace is {tuple(workspace.shape)}; expected at least {num_rows} rows and "
            "a split"
        )
    group = num_heads // num_kv_heads
    queries = count_queries(group)
    _attend[(num_rows, num_kv_heads * triton.cdiv(group, queries), splits)](
        query,
        cache_bytes(kv_cache),
        block_table,
        request,
        seq_len,
        thin_spans,
        workspace,
        scale,
        logits_soft_cap,
        *row_strides(who, "query", query),
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        splits=splits,
        L=attention_layout(plan, kv_cache.dtype, group, queries, DENSE_TILE, logits_soft_cap > 0),
        **decode_options(plan),
    )
    combine(workspace, seq_len, out)


def count_queries(group: int) -> int:
    """Query heads of a program, for groups of ``group``: a narrower one is padded."""
    return min(max(MIN_QUERIES, triton.next_power_of_2(group)), MAX_QUERIES)


def loop_tokens(plan: BlockPlan) -> int:
    """Tokens of a tile of thin blocks: eight units of quantized keys, and 64 tokens or more."""
    bits = plan.format.keys.value
    return max(64, 256 // bits) if bits else PLAIN_TILE


def decode_splits(
    num_rows: int,
    num_heads: int,
    num_kv_heads: int,
    max_context: int,
    plan: BlockPlan,
    device: torch.device,
) -> int:
    """Splits of a launch. Arguments as for ``choose_splits`` and ``decode_attention``."""
    group, options = num_heads // num_kv_heads, decode_options(plan)
    parts = num_kv_heads * triton.cdiv(group, count_queries(group))
    programs = WARPS[options["maxnreg"]] // options["num_warps"]
    processors = count_multiprocessors(device)
    return choose_splits(num_rows, parts, max_context, processors, programs)


def decode_options(plan: BlockPlan) -> dict[str, int]:
    """Options of a launch."""
    if plan.head_size > 128:
        return WIDE_OPTIONS
    is_large = plan.prunes_values or plan.format.keys is Encoding.INT2
    return LARGE_OPTIONS if is_large else OPTIONS


def launch_options(options: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Options of an attention kernel for a cache dtype.

    Tiles of float32 that are loaded ahead would not fit the shared memory of an A100 at head size
    256. Such caches are there for comparisons, so they need not be fast.
    """
    return options | {"num_stages": 1} if dtype == torch.float32 else options


@dataclass(frozen=True, eq=False)
class AttentionLayout(Layout):
    """What the attention kernels, this one and ``context.py``'s, know at compile time."""

    G: int  # query heads of a KV head
    QUERIES: int  # of a program: heads, or heads times tokens
    C_FIRST: int  # key channels of a first part, a power of two
    C_REST: int  # of a second part: two waste fewer than one. 0 if there is none
    V_PAD: int  # value channels, rounded up to a power of two
    D_PAD: int  # the same of the head size
    TILE: int  # tokens of a tile of thin blocks
    DENSE_TILE: int  # the same of dense blocks
    NUMBER: Any  # what codes become
    ASM: bool  # whether to use instructions of a GPU for that
    CAPPED: bool  # whether scores become ``cap * tanh(score / cap)``
    DOT: Any  # see ``dots.dot``


@cache
def attention_layout(
    plan: BlockPlan, dtype: torch.dtype, group: int, queries: int, dense_tile: int, capped: bool
) -> AttentionLayout:
    """The layout of a plan, for groups of ``group`` query heads and ``queries`` a program."""
    channels = triton.cdiv(plan.key_channels, 16) * 16
    first = triton.next_power_of_2(channels)
    rest = 0
    if first > channels:
        first //= 2
        rest = max(16, triton.next_power_of_2(channels - first))
    if rest == first:
        first, rest = first + rest, 0
    number = tl.float32 if dtype == torch.float32 else tl.float16
    return AttentionLayout(
        **vars(make_layout(plan, dtype)),
        G=group,
        QUERIES=queries,
        C_FIRST=first,
        C_REST=rest,
        V_PAD=max(16, triton.next_power_of_2(plan.value_channels)),
        D_PAD=triton.next_power_of_2(plan.head_size),
        TILE=loop_tokens(plan),
        DENSE_TILE=dense_tile,
        NUMBER=number,
        ASM=number == tl.float16 and not triton.knobs.runtime.interpret,
        CAPPED=capped,
        DOT=dot_type(dtype),
    )


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads."""
    layout = attention_layout(plan, dtype, 4, MIN_QUERIES, DENSE_TILE, False)
    pointers = {"query": str(layout.DTYPE), "kv": "u8", "partial": "fp32"}
    return [
        aot_case(_attend, {"L": layout}, decode_options(plan), **pointers),
        combine_case(plan.head_size, dtype),
    ]


# One binary whatever the batch and the model length: model runner V1 warms up with prompts before
# it captures a decode graph, and compiling and loading a kernel during a capture may fail.
@kernel(unaligned=("table_ptr", "request_ptr", "seq_len_ptr", "thin_spans_ptr"))
def _attend(
    query_ptr, kv_ptr, table_ptr, request_ptr, seq_len_ptr, thin_spans_ptr, partial_ptr,
    scale, cap, query_stride, query_head_stride, table_stride, block_stride, head_stride, splits,
    L: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head: sums [G, D], maxima and totals [G]."""
    query_stride, query_head_stride = whole_stride(query_stride), whole_stride(query_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    PARTS: tl.constexpr = (L.G + L.QUERIES - 1) // L.QUERIES
    row, split = tl.program_id(0), tl.program_id(2)
    kv_head, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    seq_len = tl.load(seq_len_ptr + row)
    thin_spans = tl.load(thin_spans_ptr + row)
    table = table_ptr + tl.load(request_ptr + row).to(tl.int64) * table_stride
    member = part * L.QUERIES + tl.arange(0, L.QUERIES)
    query_mask = member < L.G
    head = kv_head * L.G + member
    query_at = query_ptr + row.to(tl.int64) * query_stride + head * query_head_stride
    top = tl.full((L.QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((L.QUERIES,), tl.float32)
    sums = tl.zeros((L.D_PAD, L.QUERIES), tl.float32)
    tiles = thin_spans * span_tiles(L)
    top, total, sums = attend_thin(
        top, total, sums, query_at, query_mask, kv_ptr, table, kv_head,
        split * tiles // splits, (split + 1) * tiles // splits,
        scale, cap, block_stride, head_stride, L,
    )  # fmt: skip
    # Splits with a tile less come last among thin ones, and first here.
    first_dense = thin_spans * (L.SPAN * L.N)
    dense = tl.maximum(seq_len - first_dense, 0)
    turn = splits - 1 - split
    top, total, sums = attend_dense(
        top, total, sums, query_at, query_mask, tl.zeros((L.QUERIES,), tl.int32) + seq_len - 1,
        kv_ptr, table, kv_head,
        first_dense + turn * dense // splits, first_dense + (turn + 1) * dense // splits,
        scale, cap, block_stride, head_stride, L,
    )  # fmt: skip
    heads = tl.num_programs(1) // PARTS * L.G
    partial = partial_ptr + ((row.to(tl.int64) * heads + head) * splits + split) * (L.D + 2)
    channels = tl.arange(0, L.D_PAD)
    mask = query_mask[None, :] & (channels < L.D)[:, None]
    tl.store(partial[None, :] + channels[:, None], sums, mask=mask)
    # Weights are 2 ** BOOST too large, as if the maximum were lower.
    tl.store(partial + L.D, (top - BOOST) / LOG2E, mask=query_mask)
    tl.store(partial + L.D + 1, total, mask=query_mask)
