"""Store new keys and values in dense blocks, and clear what lies behind them."""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides, dense_rows, find_run, make_layout
from csrc_triton.checks import check_tensor, check_tokens
from csrc_triton.launch import kernel, row_strides, whole_stride
from think_vllm.kernels.checks import check_blocks, check_cache
from think_vllm.plan.planner import BlockPlan

#: Tokens of a program.
TOKENS = tl.constexpr(16)
WARPS = 4


def store_dense(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    plan: BlockPlan,
) -> None:
    """Write tokens into dense blocks, in rows of a key and a value.

    The launch depends on shapes only, so it can be part of a CUDA graph.

    Args:
        key: ``[T, Hk, D]`` in the cache's dtype; strides of dims 0 and 1 are free.
        value: ``[T, Hk, D]``. As ``key``.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free. Written.
        slot_mapping: ``[n]`` int64 with ``n <= T``. Block number times N plus the place in the
            block. Tokens whose slot is negative are skipped; so are those behind the last slot,
            with which vLLM pads a batch.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, num_tokens = "store_dense", slot_mapping.numel()
    check_blocks(who, kv_cache, plan)
    check_tokens(who, key, value, slot_mapping, kv_cache, kv_cache.dtype, plan.head_size)
    if num_tokens == 0:
        return
    grid = (triton.cdiv(num_tokens, TOKENS.value), key.shape[1])
    store_kernel[grid](
        key,
        value,
        cache_bytes(kv_cache),
        slot_mapping,
        num_tokens,
        *row_strides(who, "key", key),
        *row_strides(who, "value", value),
        **cache_strides(who, kv_cache),
        L=make_layout(plan, kv_cache.dtype),
        num_warps=WARPS,
    )


def clear_tails(
    kv_cache: torch.Tensor, block_table: torch.Tensor, seq_len: torch.Tensor, plan: BlockPlan
) -> None:
    """Set the values behind the last token of contexts to zero, up to the end of its block.

    FlashAttention may read whole blocks, and gives what lies behind a context the weight zero,
    which leaves a NaN a NaN. A block that was thin before has codes and tables there, whose bytes
    can spell one. Scores of such keys are replaced, so keys stay as they are.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free. Written.
        block_table: ``[n, W]`` int32. Blocks of each context.
        seq_len: ``[n]`` int32. Tokens of each, the last of them in a dense block; 0 for none.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, num_contexts = "clear_tails", block_table.shape[0]
    check_cache(who, kv_cache, block_table, plan)
    check_tensor(who, "seq_len", seq_len, torch.int32, (num_contexts,), kv_cache.device)
    if num_contexts == 0:
        return
    clear_kernel[(num_contexts, kv_cache.shape[1])](
        cache_bytes(kv_cache),
        block_table,
        seq_len,
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        L=make_layout(plan, kv_cache.dtype),
        num_warps=WARPS,
    )


@kernel(unaligned=("slot_ptr",))
def store_kernel(
    key_ptr, value_ptr, kv_ptr, slot_ptr, num_tokens, key_stride, key_head_stride,
    value_stride, value_head_stride, block_stride, head_stride,
    L: tl.constexpr,
):  # fmt: skip
    """One program per (tile of tokens, KV head)."""
    D_PAD: tl.constexpr = triton.next_power_of_2(L.D)
    key_stride, key_head_stride = whole_stride(key_stride), whole_stride(key_head_stride)
    value_stride, value_head_stride = whole_stride(value_stride), whole_stride(value_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1)
    stored = slot >= 0
    block, place = slot // L.N, slot % L.N
    run = kv_ptr + block * block_stride + head * head_stride
    # Elements before offsets, see csrc_triton/quantization.py.
    run = run.to(tl.pointer_type(L.DTYPE), bitcast=True)
    channel = tl.arange(0, D_PAD)
    wide = token.to(tl.int64)

    mask = stored[:, None] & (channel < L.D)[None, :]
    target = dense_rows(run, place, L.D)[:, None] + channel[None, :]
    source = key_ptr + head * key_head_stride + wide * key_stride
    tl.store(target, tl.load(source[:, None] + channel[None, :], mask=mask), mask=mask)
    source = value_ptr + head * value_head_stride + wide * value_stride
    tl.store(target + L.D, tl.load(source[:, None] + channel[None, :], mask=mask), mask=mask)


@kernel(unaligned=("table_ptr", "length_ptr"))
def clear_kernel(
    kv_ptr, table_ptr, length_ptr, table_stride, block_stride, head_stride,
    L: tl.constexpr,
):  # fmt: skip
    """One program per (context, KV head)."""
    D_PAD: tl.constexpr = triton.next_power_of_2(L.D)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    context = tl.program_id(0)
    length = tl.load(length_ptr + context)
    if length == 0:
        return
    entry = (length - 1) // L.N
    block = tl.load(table_ptr + context.to(tl.int64) * table_stride + entry)
    run = find_run(kv_ptr, block, tl.program_id(1), block_stride, head_stride)
    run = run.to(tl.pointer_type(L.DTYPE), bitcast=True)
    channel = tl.arange(0, D_PAD)
    zeros = tl.zeros((TOKENS, D_PAD), L.DTYPE)
    for first in range(length - entry * L.N, L.N, TOKENS):
        place = first + tl.arange(0, TOKENS)
        target = dense_rows(run, place, L.D)[:, None] + L.D + channel[None, :]
        tl.store(target, zeros, mask=(place < L.N)[:, None] & (channel < L.D)[None, :])


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles."""
    constants, options = {"L": make_layout(plan, dtype)}, {"num_warps": WARPS}
    element = str(constants["L"].DTYPE)
    pointers = {"key": element, "value": element, "kv": "u8", "slot": "i64"}
    return [
        aot_case(store_kernel, constants, options, **pointers),
        aot_case(clear_kernel, constants, options, kv="u8"),
    ]
