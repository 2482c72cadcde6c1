"""Eviction on CPUs: the kernels of an ``Evictor``, and decode rows that skip empty spans."""

import numpy as np
import torch

from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.cpu.decode import DecodeRows
from think_vllm.kernels.cpu.scoring import key_energy
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.evictor import Evictor
from think_vllm.worker.step import Int64Array


class CPUEvictor(Evictor):
    """An evictor whose kernels are numba's."""

    form = BlockForm.CPU

    def _key_energy(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        row: int,
        num_tokens: int,
        first_block: int,
    ) -> torch.Tensor:
        numbers = (np.full(1, number, np.int32) for number in (row, num_tokens, first_block))
        request, length, first = numbers
        return key_energy(kv_cache, block_table, request, length, self.plan, first)[0]

    def _compact(self, packed: torch.Tensor, channels: torch.Tensor | None) -> None:
        plan, num_kv_heads = self.plan, packed.shape[1]
        spans = np.arange(len(packed) // plan.span_blocks, dtype=np.int32)
        if channels is None:
            channels = torch.arange(plan.head_size, dtype=torch.uint8).repeat(num_kv_heads, 1)
        compact_spans(
            packed,
            torch.arange(len(packed), dtype=torch.int32)[None],
            np.zeros_like(spans),
            spans,
            channels.expand(len(spans), -1, -1),
            plan,
        )


def skip_evicted(
    rule: SpanRule, rows: DecodeRows, evicted: Int64Array, row_entries: int
) -> DecodeRows:
    """Let queries past their prompts begin behind the empty spans.

    Args:
        rule: What a span is.
        rows: With rows of the block table.
        evicted: int64 [num_reqs]. Empty spans of each request.
        row_entries: Entries from one row of the block table to the next.

    Returns:
        The same queries over ``table_of_entries``, as if the empty spans had never been.
    """
    evicted = evicted[rows.request]
    return DecodeRows(
        request=(rows.request * row_entries + evicted * rule.span_blocks).astype(np.int32),
        seq_len=(rows.seq_len - evicted * rule.span_tokens).astype(np.int32),
        thin_spans=(rows.thin_spans - evicted).astype(np.int32),
    )
