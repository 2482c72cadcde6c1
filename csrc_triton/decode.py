"""Decode attention over thin and dense blocks (flash-decoding form).

A program takes one row, one KV head and one split of the context, and reads every key and value
of it once for all query heads of the group. A split is a run of blocks, all thin or all dense.
Splits share a softmax through a second kernel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase
from csrc_triton.blocks import (
    cache_bytes,
    cache_strides,
    check_cache,
    element_type,
    layout_constants,
)
from csrc_triton.dots import dot_constants
from csrc_triton.matrices import column_of, output_parts
from csrc_triton.tiles import attend_dense, attend_thin
from think_vllm.formats import FORMATS
from think_vllm.planner import BlockPlan

#: Rows of ``tl.dot`` operands: a group of fewer query heads is padded.
MIN_GROUP = 16
#: Fewest tokens of a split: below, the second kernel costs more than the parallel reading saves.
MIN_SPLIT_TOKENS = 256
#: Programs that keep a large GPU busy.
WANTED_PROGRAMS = 1024
#: Tokens of a tile. Integer keys: the smallest group, so that a tile has one scale per channel.
PLAIN_TILE = 64
INTEGER_TILE = 32
#: Bytes that the keys, or the values, of a tile of elements take at most: two tiles of each have to
#: fit shared memory, of which GPUs of compute capability 8.6 and 8.9 have 99 KiB for a program.
TILE_BYTES = 16 * 2**10
MAX_SPLITS = 64
OPTIONS = {"num_warps": 4}


def choose_splits(num_rows: int, num_kv_heads: int, max_context: int) -> int:
    """Splits of a context, at least one for thin blocks and one for dense ones.

    Depends on host numbers alone, so that CUDA graphs can keep it.

    Args:
        num_rows: Queries of the batch, padding included.
        num_kv_heads: ``Hk``.
        max_context: Longest context that the launch must serve, in tokens.
    """
    wanted = triton.cdiv(WANTED_PROGRAMS, max(1, num_rows * num_kv_heads))
    useful = triton.cdiv(max_context, MIN_SPLIT_TOKENS)
    return max(2, min(wanted, useful, MAX_SPLITS))


def make_workspace(
    num_rows: int, num_heads: int, head_size: int, splits: int, device: torch.device
) -> torch.Tensor:
    """Memory for the results of splits: float32 ``[num_rows, num_heads, splits, D + 2]``."""
    return torch.empty(
        num_rows, num_heads, splits, head_size + 2, dtype=torch.float32, device=device
    )


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
        workspace: Of ``make_workspace``, for at least R rows; its splits, two or more, are used.
            None makes one.
        max_context: Longest context, for the number of splits; None takes the block table's width.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.
    """
    who = "decode_attention"
    check_cache(who, kv_cache, block_table, plan)
    check_rows(who, query, kv_cache, out)
    for name, values in (("request", request), ("seq_len", seq_len), ("thin_spans", thin_spans)):
        if values.shape != query.shape[:1] or values.dtype != torch.int32:
            raise ValueError(
                f"{who}: {name} is {values.dtype} {tuple(values.shape)}; expected int32 "
                f"[{query.shape[0]}]"
            )
    num_rows, num_heads, head_size = query.shape
    num_kv_heads = kv_cache.shape[1]
    if num_rows == 0:
        return
    if workspace is None:
        longest = max_context or block_table.shape[1] * plan.block_size
        splits = choose_splits(num_rows, num_kv_heads, longest)
        workspace = make_workspace(num_rows, num_heads, head_size, splits, query.device)
    splits = workspace.shape[2]
    if splits < 2 or workspace.shape[0] < num_rows:
        raise ValueError(
            f"{who}: workspace is {tuple(workspace.shape)}; expected at least {num_rows} rows and "
            "2 splits"
        )
    group = num_heads // num_kv_heads
    _attend[(num_rows, num_kv_heads, splits)](
        query,
        cache_bytes(kv_cache),
        block_table,
        request,
        seq_len,
        thin_spans,
        workspace,
        scale,
        logits_soft_cap,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        **cache_strides(kv_cache),
        splits=splits,
        ROWS=max(MIN_GROUP, triton.next_power_of_2(group)),
        **attention_constants(plan, kv_cache.dtype, group, logits_soft_cap > 0),
        **launch_options(OPTIONS, kv_cache.dtype),
    )
    _combine[(num_rows, num_heads)](
        workspace,
        seq_len,
        out,
        out.stride(0),
        out.stride(1),
        splits,
        D=head_size,
        D_PAD=triton.next_power_of_2(head_size),
        SPLITS_PAD=max(MAX_SPLITS, triton.next_power_of_2(splits)),
        num_warps=1,
    )


def launch_options(options: dict[str, int], dtype: torch.dtype) -> dict[str, int]:
    """Options of an attention kernel for a cache dtype.

    Tiles of float32 that are loaded ahead would not fit the shared memory of an A100 at head size
    256. Such caches are there for comparisons, so they need not be fast.
    """
    return options | {"num_stages": 1} if dtype == torch.float32 else options


def attention_constants(
    plan: BlockPlan, dtype: torch.dtype, group: int, capped: bool
) -> dict[str, Any]:
    """What the attention kernels, this one and ``context.py``'s, know at compile time."""
    wide = triton.next_power_of_2(plan.head_size)
    plain = max(16, min(PLAIN_TILE, TILE_BYTES // (wide * dtype.itemsize)))
    coded = INTEGER_TILE if plan.format.keys.is_integer else PLAIN_TILE
    # A tile of integer values has whole groups.
    least = plan.config.kv_quant_group if plan.format.values.is_integer else 16
    return {
        "G": group,
        "D_PAD": wide,
        "C_PAD": max(16, triton.next_power_of_2(plan.key_channels)),
        "V_PAD": max(least, triton.next_power_of_2(plan.value_channels)),
        "TILE": plain if plan.format is FORMATS["none"] else coded,
        "DENSE_TILE": plain,
        "CAPPED": capped,
        **dot_constants(dtype),
        **layout_constants(plan),
    }


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles: groups of 4 query heads."""
    element = str(element_type(dtype))
    pointers = {"query_ptr": element, "kv_ptr": "u8", "table_ptr": "i32", "request_ptr": "i32",
                "seq_len_ptr": "i32", "thin_spans_ptr": "i32", "partial_ptr": "fp32"}  # fmt: skip
    signature = {name: f"*{kind}:16" for name, kind in pointers.items()}
    signature |= dict.fromkeys(("scale", "cap"), "fp32")
    strides = ("query_stride", "query_head_stride", "block_stride", "head_stride")
    signature |= dict.fromkeys(strides, "i32:16")
    signature |= dict.fromkeys(("table_stride", "splits"), "i32")
    constants = {"ROWS": MIN_GROUP, **attention_constants(plan, dtype, 4, False)}
    combine = {"partial_ptr": "*fp32:16", "seq_len_ptr": "*i32:16", "out_ptr": f"*{element}:16",
               "out_stride": "i32:16", "out_head_stride": "i32:16", "splits": "i32"}  # fmt: skip
    sizes = {"D": plan.head_size, "D_PAD": constants["D_PAD"], "SPLITS_PAD": MAX_SPLITS}
    return [
        AotCase(_attend, signature, constants, launch_options(OPTIONS, dtype)),
        AotCase(_combine, combine, sizes, {"num_warps": 1}),
    ]


def check_rows(who: str, query: torch.Tensor, kv_cache: torch.Tensor, out: torch.Tensor) -> None:
    """Check queries and outputs ``[R, Hq, D]`` against the cache.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    head_size = kv_cache.shape[3] // 2
    if query.dim() != 3 or query.shape[2] != head_size or query.stride(2) != 1:
        raise ValueError(
            f"{who}: query has shape {tuple(query.shape)} and strides {query.stride()}; expected "
            f"[R, Hq, {head_size}] with contiguous channels"
        )
    if query.shape[1] == 0 or query.shape[1] % kv_cache.shape[1]:
        raise ValueError(
            f"{who}: query has {query.shape[1]} heads, there are {kv_cache.shape[1]} KV heads; "
            "expected a positive multiple"
        )
    if out.shape != query.shape or out.stride(2) != 1:
        raise ValueError(
            f"{who}: out has shape {tuple(out.shape)} and strides {out.stride()}; expected "
            f"{tuple(query.shape)} with contiguous channels"
        )
    if query.dtype != kv_cache.dtype or out.dtype != kv_cache.dtype:
        raise ValueError(
            f"{who}: query is {query.dtype}, out is {out.dtype}, kv_cache is {kv_cache.dtype}; "
            "expected one dtype"
        )


# One binary whatever the batch and the model length: model runner V1 warms up with prompts before
# it captures a decode graph, and compiling and loading a kernel during a capture may fail.
@triton.jit(do_not_specialize=["table_stride", "splits"])
def _attend(
    query_ptr, kv_ptr, table_ptr, request_ptr, seq_len_ptr, thin_spans_ptr, partial_ptr,
    scale, cap, query_stride, query_head_stride, table_stride, block_stride, head_stride, splits,
    G: tl.constexpr, ROWS: tl.constexpr, D_PAD: tl.constexpr, C_PAD: tl.constexpr,
    V_PAD: tl.constexpr, TILE: tl.constexpr, DENSE_TILE: tl.constexpr,
    DTYPE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr,
    D: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr, THIN: tl.constexpr, T: tl.constexpr,
    C: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, GROUP: tl.constexpr,
    KEY_ROW: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_ZEROS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_ROW: tl.constexpr, VALUE_SCALES: tl.constexpr,
    VALUE_ZEROS: tl.constexpr, TABLE: tl.constexpr, V: tl.constexpr, VALUE_TABLE: tl.constexpr,
):  # fmt: skip
    """One split of one row and KV head: sums [G, D], maxima and totals [G]."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq_len = tl.load(seq_len_ptr + row)
    thin_spans = tl.load(thin_spans_ptr + row)
    thin_blocks, first_dense = thin_spans * THIN, thin_spans * SPAN
    last_dense = tl.maximum(tl.cdiv(seq_len, N), first_dense)
    dense_blocks = last_dense - first_dense
    # A split is all thin or all dense. A block has as many bytes either way, so they share the
    # splits by blocks, and each gets one at least.
    thin_splits = splits * thin_blocks // tl.maximum(thin_blocks + dense_blocks, 1)
    thin_splits = tl.minimum(thin_splits, splits - tl.minimum(dense_blocks, 1))
    thin_splits = tl.maximum(thin_splits, tl.minimum(thin_blocks, 1))
    table = table_ptr + tl.load(request_ptr + row).to(tl.int64) * table_stride

    heads = tl.arange(0, ROWS)
    head_mask = heads < G
    query_at = query_ptr + row.to(tl.int64) * query_stride
    query_at += (kv_head * G + heads)[:, None] * query_head_stride
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, D_PAD), tl.float32)
    head = (row.to(tl.int64) * tl.num_programs(1) + kv_head) * G + heads
    partial = partial_ptr + (head * splits + split) * (D + 2)
    if split < thin_splits:
        per_split = tl.cdiv(thin_blocks, thin_splits)
        begin = tl.minimum(split * per_split, thin_blocks)
        top, total, sums = attend_thin(
            top, total, sums, query_at, head_mask, kv_ptr, table, kv_head,
            begin, tl.minimum(begin + per_split, thin_blocks),
            scale, cap, block_stride, head_stride,
            C_PAD, V_PAD, D_PAD, TILE, DTYPE, DOT, PRECISION, CAPPED,
            D, N, SPAN, THIN, T, C, KEY_BITS, VALUE_BITS, GROUP, KEY_ROW, KEY_SCALES, KEY_ZEROS,
            VALUES, VALUE_ROW, VALUE_SCALES, VALUE_ZEROS, TABLE, V, VALUE_TABLE,
        )  # fmt: skip
        parts: tl.constexpr = output_parts(VALUE_BITS, VALUE_TABLE)
        channels = column_of(tl.arange(0, D_PAD), D_PAD, parts)
        mask = head_mask[:, None] & (channels < D)[None, :]
        tl.store(partial[:, None] + channels[None, :], sums, mask=mask)
    else:
        per_split = tl.cdiv(dense_blocks, splits - thin_splits)
        begin = tl.minimum(first_dense + (split - thin_splits) * per_split, last_dense)
        top, total, sums = attend_dense(
            top, total, sums, query_at, head_mask, tl.zeros((ROWS,), tl.int32) + seq_len - 1,
            kv_ptr, table, kv_head, begin, tl.minimum(begin + per_split, last_dense), seq_len,
            scale, cap, block_stride, head_stride,
            D_PAD, DENSE_TILE, DTYPE, DOT, PRECISION, CAPPED, D, N,
        )  # fmt: skip
        channels = tl.arange(0, D_PAD)
        mask = head_mask[:, None] & (channels < D)[None, :]
        tl.store(partial[:, None] + channels[None, :], sums, mask=mask)
    tl.store(partial + D, top, mask=head_mask)
    tl.store(partial + D + 1, total, mask=head_mask)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial_ptr, seq_len_ptr, out_ptr, out_stride, out_head_stride, splits,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row and query head against each other."""
    row, head = tl.program_id(0), tl.program_id(1)
    first = (row.to(tl.int64) * tl.num_programs(1) + head) * splits
    result = combine_splits(partial_ptr + first * (D + 2), splits, D, D_PAD, SPLITS_PAD)
    result = tl.where(tl.load(seq_len_ptr + row) > 0, result, 0.0)
    channels = tl.arange(0, D_PAD)
    out = out_ptr + row.to(tl.int64) * out_stride + head * out_head_stride + channels
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=channels < D)


@triton.jit
def combine_splits(partial, splits, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """Sum up splits, each of ``D`` channels, its maximum and its total, from ``partial`` on."""
    split = tl.arange(0, SPLITS_PAD)
    channels = tl.arange(0, D_PAD)
    channel_mask = channels < D
    tops = tl.load(partial + split * (D + 2) + D, mask=split < splits, other=float("-inf"))
    top = tl.max(tops, axis=0)
    # An empty split has -inf and 0, hence weight 0. A padding row has nothing else.
    top = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    result = tl.zeros((D_PAD,), tl.float32)
    for _ in range(splits):
        factor = tl.exp(tl.load(partial + D) - top)
        total += factor * tl.load(partial + D + 1)
        result += factor * tl.load(partial + channels, mask=channel_mask, other=0.0)
        partial += D + 2
    return result / tl.where(total == 0.0, 1.0, total)
