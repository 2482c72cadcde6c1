"""Rewriting a span of dense blocks as thin blocks, in plain torch."""

from collections.abc import Sequence

import torch

from think_vllm.planner import BlockPlan


def dense_tokens(
    kv_cache: torch.Tensor, blocks: Sequence[int], num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read keys and values of consecutive dense blocks.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        blocks: Block numbers, in token order.
        num_tokens: How many tokens to read.

    Returns:
        Keys and values, both ``[Hk, num_tokens, D]``, copies.
    """
    num_heads, block_size, width = kv_cache.shape[1:]
    head_size = width // 2
    runs = kv_cache[list(blocks)].reshape(len(blocks), num_heads, 2, -1)
    keys = runs[:, :, 0].reshape(len(blocks), num_heads, head_size, block_size).transpose(2, 3)
    values = runs[:, :, 1].reshape(len(blocks), num_heads, block_size, head_size)
    return (
        keys.transpose(0, 1).reshape(num_heads, -1, head_size)[:, :num_tokens].clone(),
        values.transpose(0, 1).reshape(num_heads, -1, head_size)[:, :num_tokens].clone(),
    )


def thin_views(
    kv_cache: torch.Tensor, block: int, head: int, plan: BlockPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View one head's part of a thin block.

    Returns:
        Keys ``[C, t]`` and values ``[t, D]`` of the cache's dtype, table ``[C]`` uint8; they
        share the cache's memory.
    """
    layout = plan.layout
    run = kv_cache[block, head].view(-1)
    keys_end = plan.key_channels * plan.thin_block_tokens
    values_start = layout.values_offset // plan.itemsize
    values_end = values_start + plan.thin_block_tokens * plan.head_size
    table = run.view(torch.uint8)[layout.table_offset : layout.table_offset + plan.key_channels]
    return (
        run[:keys_end].view(plan.key_channels, plan.thin_block_tokens),
        run[values_start:values_end].view(plan.thin_block_tokens, plan.head_size),
        table,
    )


def compact_spans_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    span: Sequence[int],
    channels: torch.Tensor,
    plan: BlockPlan,
) -> None:
    """Compact spans in place.

    Source: ThinK, arXiv 2407.21018, section 3.3; the paged form is this project's.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Written.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]``. Row of the block table.
        span: ``[n]``. Span of that request.
        channels: ``[n, Hk, C]`` uint8. Kept channels, ascending.
        plan: How blocks are laid out.
    """
    for index, (row, number) in enumerate(zip(request, span, strict=True)):
        first = int(number) * plan.span_blocks
        blocks = block_table[int(row), first : first + plan.span_blocks].tolist()
        keys, values = dense_tokens(kv_cache, blocks, plan.span_tokens)
        for k, block in enumerate(blocks[: plan.thin_blocks]):
            tokens = slice(k * plan.thin_block_tokens, (k + 1) * plan.thin_block_tokens)
            for head in range(kv_cache.shape[1]):
                kept = channels[index, head].long()
                thin_keys, thin_values, table = thin_views(kv_cache, block, head, plan)
                count = keys[head, tokens].shape[0]
                thin_keys[:, :count] = keys[head, tokens][:, kept].T
                thin_values[:count] = values[head, tokens]
                table.copy_(channels[index, head])


def read_channels_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    span: Sequence[int],
    plan: BlockPlan,
) -> torch.Tensor:
    """Read the channel tables of spans: ``[n, Hk, C]`` uint8. Arguments as above."""
    tables = []
    for row, number in zip(request, span, strict=True):
        block = int(block_table[int(row), int(number) * plan.span_blocks])
        heads = range(kv_cache.shape[1])
        tables.append(torch.stack([thin_views(kv_cache, block, h, plan)[2] for h in heads]))
    return torch.stack(tables)
