"""Decode attention over thin and dense blocks, in plain torch and float64."""

from collections.abc import Sequence

import torch

from think_vllm.kernels.reference.compaction import dense_tokens, read_thin, split_channels
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan


def gather_context(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: int,
    seq_len: int,
    thin_spans: int,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a request's context at full width, pruned channels being zero.

    ``form`` is that of dense blocks, all else as for ``decode_attention_ref``.

    Returns:
        Keys and values, both ``[Hk, seq_len, D]`` float64.
    """
    num_heads = kv_cache.shape[1]
    keys = torch.zeros(num_heads, seq_len, plan.head_size, dtype=torch.float64)
    values = torch.zeros_like(keys)
    for span in range(thin_spans):
        start = span * plan.span_tokens
        for k in range(plan.thin_blocks):
            block = int(block_table[request, span * plan.span_blocks + k])
            first = start + k * plan.thin_block_tokens
            count = min(plan.thin_block_tokens, start + plan.span_tokens - first)
            for head in range(num_heads):
                thin_keys, thin_values, table = read_thin(kv_cache, block, head, count, plan, form)
                of_keys, of_values = split_channels(table, plan)
                keys[head, first : first + count, of_keys] = thin_keys.T
                values[head, first : first + count, of_values] = thin_values
    start = thin_spans * plan.span_tokens
    if seq_len > start:
        blocks = block_table[request, start // plan.block_size : -(-seq_len // plan.block_size)]
        dense = dense_tokens(kv_cache, blocks.tolist(), seq_len - start, form)
        keys[:, start:], values[:, start:] = dense[0].double(), dense[1].double()
    return keys, values


def softmax_ref(
    scores: torch.Tensor, logits_soft_cap: float, sinks: torch.Tensor | None, head: int
) -> torch.Tensor:
    """Weights of one query head's scores ``[n]`` float64.

    Scores become ``cap * tanh(score / cap)`` if the cap is positive. ``sinks`` ``[Hq]`` are one
    more score per query head, not capped, whose weight goes to no value.
    """
    length = scores.shape[0]
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    if sinks is not None:
        scores = torch.cat([scores, sinks[head : head + 1].double()])
    return torch.softmax(scores, dim=0)[:length]


def decode_attention_ref(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    seq_len: Sequence[int],
    thin_spans: Sequence[int],
    plan: BlockPlan,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    form: BlockForm = BlockForm.CPU,
) -> torch.Tensor:
    """Attend with single query tokens to contexts of thin, then dense blocks.

    Source: ThinK, arXiv 2407.21018, section 3.3.

    Args:
        query: ``[R, Hq, D]``.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        block_table: ``[num_requests, W]`` int32.
        request: ``[R]``. Row of the block table.
        seq_len: ``[R]``. Tokens that the query attends to; 0 for padding.
        thin_spans: ``[R]``. Spans at the start of its context that are thin.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]``. One more score per query head, not capped, whose weight goes to no value.
        form: For what blocks are laid out.

    Returns:
        ``[R, Hq, D]`` float64, zeros where ``seq_len`` is 0.
    """
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // kv_cache.shape[1]
    rows = zip(request, seq_len, thin_spans, strict=True)
    for row, (source, length, thin) in enumerate(rows):
        if length == 0:
            continue
        keys, values = gather_context(
            kv_cache, block_table, int(source), int(length), int(thin), plan, form
        )
        for head in range(query.shape[1]):
            scores = keys[head // group] @ query[row, head].double() * scale
            weights = softmax_ref(scores, logits_soft_cap, sinks, head)
            out[row, head] = weights @ values[head // group]
    return out
