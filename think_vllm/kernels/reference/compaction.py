"""Rewriting a span of dense blocks as thin blocks, in plain torch."""

from collections.abc import Sequence

import torch

from think_vllm.kernels.reference.quantization import read_matrix, write_matrix
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan


def split_dense(kv_cache: torch.Tensor, form: BlockForm) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as keys and values of dense blocks, both ``[num_blocks, Hk, N, D]``.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        form: Of dense blocks.
    """
    block_size, width = kv_cache.shape[2:]
    head_size = width // 2
    if form is BlockForm.GPU:
        return kv_cache[..., :head_size], kv_cache[..., head_size:]
    runs, half = kv_cache.flatten(2), block_size * head_size
    keys = runs[..., :half].view(*runs.shape[:2], head_size, block_size).transpose(2, 3)
    return keys, runs[..., half:].view(*runs.shape[:2], block_size, head_size)


def dense_tokens(
    kv_cache: torch.Tensor, blocks: Sequence[int], num_tokens: int, form: BlockForm = BlockForm.CPU
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read keys and values of consecutive dense blocks.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        blocks: Block numbers, in token order.
        num_tokens: How many tokens to read.
        form: Of dense blocks.

    Returns:
        Keys and values, both ``[Hk, num_tokens, D]``, copies.
    """
    keys, values = (
        part[list(blocks)].transpose(0, 1).flatten(1, 2)[:, :num_tokens].clone()
        for part in split_dense(kv_cache, form)
    )
    return keys, values


def thin_run(kv_cache: torch.Tensor, block: int, head: int) -> torch.Tensor:
    """View one (block, head) as ``[run_bytes]`` uint8 that shares the cache's memory."""
    return kv_cache[block, head].view(-1).view(torch.uint8)


def read_thin(
    kv_cache: torch.Tensor,
    block: int,
    head: int,
    count: int,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read one head's part of a thin block that holds ``count`` tokens.

    Returns:
        Keys ``[C, count]`` and values ``[count, V]``, float64, and the kept channels ``[K]``
        uint8.
    """
    run, layout = thin_run(kv_cache, block, head), plan.layout
    keys = read_matrix(run, layout.keys, plan.key_channels, count, kv_cache.dtype, form)
    values = read_matrix(run, layout.values, count, plan.value_channels, kv_cache.dtype, form)
    table = torch.arange(plan.key_channels, dtype=torch.uint8)
    if layout.has_table:
        table = run[layout.table_offset :][: plan.key_channels].clone()
    if layout.has_value_table:
        table = torch.cat([table, run[layout.value_table_offset :][: plan.value_channels]])
    return keys, values, table


def split_channels(table: torch.Tensor, plan: BlockPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept channels ``[..., K]`` uint8 -> those of keys ``[..., C]`` and of values, int64."""
    keys = table[..., : plan.key_channels].long()
    values = table[..., plan.key_channels :].long()
    if not plan.prunes_values:
        values = torch.arange(plan.head_size).expand(*table.shape[:-1], -1)
    return keys, values


def write_thin(
    kv_cache: torch.Tensor,
    block: int,
    head: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    table: torch.Tensor,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> None:
    """Write one head's part of a thin block.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Written.
        block: Block number.
        head: KV head.
        keys: ``[C, count]`` of the cache's dtype.
        values: ``[count, V]`` of the cache's dtype.
        table: ``[K]`` uint8. Kept channels of keys, then of values if some are pruned; ascending.
        plan: How blocks are laid out.
        form: For what.
    """
    run, layout = thin_run(kv_cache, block, head), plan.layout
    write_matrix(run, keys, layout.keys, form)
    write_matrix(run, values, layout.values, form)
    if layout.has_table:
        run[layout.table_offset :][: plan.key_channels] = table[: plan.key_channels]
    if layout.has_value_table:
        run[layout.value_table_offset :][: plan.value_channels] = table[plan.key_channels :]


def compact_spans_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    span: Sequence[int],
    channels: torch.Tensor,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> None:
    """Compact spans in place.

    Sources: ThinK, arXiv 2407.21018, section 3.3, and KIVI, arXiv 2402.02750; the paged form is
    this project's.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Written.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]``. Row of the block table.
        span: ``[n]``. Span of that request.
        channels: ``[n, Hk, K]`` uint8. Kept channels of keys, then of values if some are pruned;
            ascending.
        plan: How blocks are laid out.
        form: For what.
    """
    for index, (row, number) in enumerate(zip(request, span, strict=True)):
        first = int(number) * plan.span_blocks
        blocks = block_table[int(row), first : first + plan.span_blocks].tolist()
        keys, values = dense_tokens(kv_cache, blocks, plan.span_tokens, form)
        for k, block in enumerate(blocks[: plan.thin_blocks]):
            tokens = slice(k * plan.thin_block_tokens, (k + 1) * plan.thin_block_tokens)
            for head in range(kv_cache.shape[1]):
                table = channels[index, head]
                of_keys, of_values = split_channels(table, plan)
                kept = keys[head, tokens][:, of_keys].T, values[head, tokens][:, of_values]
                write_thin(kv_cache, block, head, *kept, table, plan, form)


def read_channels_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    span: Sequence[int],
    plan: BlockPlan,
) -> torch.Tensor:
    """Read the channel tables of spans: ``[n, Hk, K]`` uint8. Arguments as above."""
    tables = []
    for row, number in zip(request, span, strict=True):
        block = int(block_table[int(row), int(number) * plan.span_blocks])
        heads = range(kv_cache.shape[1])
        tables.append(torch.stack([read_thin(kv_cache, block, h, 1, plan)[2] for h in heads]))
    return torch.stack(tables)
