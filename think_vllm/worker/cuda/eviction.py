"""Eviction on GPUs: the kernels of an ``Evictor``, and queries that skip empty spans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from csrc_triton.compact import compact_spans
from csrc_triton.scores import key_energy
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.cuda.metadata import Chunks, Rows, WaveParts
from think_vllm.worker.evictor import Evictor
from think_vllm.worker.step import Int64Array

Q = TypeVar("Q", Rows, Chunks)


class CUDAEvictor(Evictor):
    """An evictor whose kernels are Triton's. Nothing waits for the device."""

    form = BlockForm.GPU

    def _key_energy(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        row: int,
        num_tokens: int,
        first_block: int,
    ) -> torch.Tensor:
        request, length, first = (
            torch.full((1,), number, dtype=torch.int32, device=kv_cache.device)
            for number in (row, num_tokens, first_block)
        )
        dense = num_tokens - first_block * self.plan.block_size
        return key_energy(kv_cache, block_table, request, length, self.plan, dense, first)[0]

    def _compact(self, packed: torch.Tensor, channels: torch.Tensor | None) -> None:
        plan, device = self.plan, packed.device
        span = torch.arange(len(packed) // plan.span_blocks, dtype=torch.int32, device=device)
        if channels is not None:
            channels = channels.repeat(len(span), 1, 1)
        table = torch.arange(len(packed), dtype=torch.int32, device=device)[None]
        compact_spans(packed, table, torch.zeros_like(span), span, channels, plan)


def _less(thin_spans: torch.Tensor | None, empty: torch.Tensor) -> Any:
    """Thin spans that are not empty; None for queries that see none."""
    return None if thin_spans is None else thin_spans - empty


def skip_evicted(
    rule: SpanRule, wave: WaveParts, evicted: Int64Array, row_entries: int
) -> WaveParts:
    """Let queries past their prompts begin behind the empty spans, still on the host.

    Args:
        rule: What a span is.
        wave: With rows of the block table.
        evicted: int64 [num_reqs]. Empty spans of each request.
        row_entries: Entries from one row of the block table to the next.

    Returns:
        The same queries over ``table_of_entries``, as if the empty spans had never been.
    """

    def skip(queries: Q) -> Q:
        empty = torch.from_numpy(evicted[queries.request.numpy()]).int()
        return replace(
            queries,
            request=queries.request * row_entries + empty * rule.span_blocks,
            seq_len=queries.seq_len - empty * rule.span_tokens,
            thin_spans=_less(queries.thin_spans, empty),
        )

    return replace(
        wave,
        rows=None if wave.rows is None else skip(wave.rows),
        chunks=[skip(chunks) for chunks in wave.chunks],
    )


class EmptySpans:
    """Where the contexts of a decode batch begin, in buffers that keep their addresses.

    Args:
        rows: Requests of a batch, at most.
        device: Of the buffers.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._entry, self._skipped, self._seq_len = torch.zeros(
            3, rows, dtype=torch.int32, device=device
        )
        self._sent = np.zeros((2, rows), np.int32)

    def forget(self) -> None:
        """Leave no tokens to any row."""
        self._seq_len.zero_()

    def skip(
        self, rule: SpanRule, evicted: Int64Array, seq_len: torch.Tensor, row_entries: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Entry of the block table at which each row begins, and tokens from there on.

        Args:
            rule: What a span is.
            evicted: int64 [n]. Empty spans of the first rows; padding has none.
            seq_len: int32 [rows]. Tokens of each row.
            row_entries: Entries from one row of the block table to the next.
        """
        count = seq_len.shape[0]
        wanted = np.zeros((2, count), np.int32)
        wanted[0] = np.arange(count) * row_entries
        wanted[0, : evicted.size] += evicted * rule.span_blocks
        wanted[1, : evicted.size] = evicted * rule.span_tokens
        if not np.array_equal(wanted, self._sent[:, :count]):
            self._sent[:, :count] = wanted
            for values, buffer in zip(wanted, (self._entry, self._skipped), strict=True):
                async_tensor_h2d(values, out=buffer[:count])
        torch.sub(seq_len, self._skipped[:count], out=self._seq_len[:count])
        return self._entry[:count], self._seq_len[:count]
