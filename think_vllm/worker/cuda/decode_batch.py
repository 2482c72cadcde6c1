"""Rows of a decode batch on a GPU, in buffers that keep their addresses for CUDA graphs."""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from think_vllm.plan.planner import BlockPlan
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step import Int64Array
from think_vllm.worker.step_tensors import Rows


class DecodeBatch:
    """Rows of a batch of single queries past their prompts.

    Args:
        plan: How blocks are pruned, quantized and evicted.
        max_rows: Requests of a batch, at most.
        device: Of the buffers.
    """

    def __init__(self, plan: BlockPlan, max_rows: int, device: torch.device) -> None:
        self._rule = plan.rule
        self._request = torch.arange(max_rows, dtype=torch.int32, device=device)
        self._thin_spans = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._sent = np.zeros(max_rows, np.int32)
        self._empty = EmptySpans(max_rows, device) if plan.config.evicts else None

    def forget(self) -> None:
        """Let no row read a block of the last batch's."""
        self._thin_spans.zero_()
        self._sent[:] = 0
        if self._empty is not None:
            self._empty.forget()

    def rows(
        self, seq_len: torch.Tensor, thin_spans: Int64Array, evicted: Int64Array, row_entries: int
    ) -> Rows:
        """One query per row, padding behind those of requests.

        Args:
            seq_len: int32 [rows]. VLLM's own, where it is.
            thin_spans: int64 [num_reqs]. Spans that each request's query sees thin.
            evicted: int64 [num_reqs]. Empty spans of each request.
            row_entries: Entries from one row of the block table to the next.
        """
        count = seq_len.shape[0]
        wanted = np.zeros(count, np.int32)
        wanted[: thin_spans.size] = thin_spans - evicted
        # Spans fall due once in a hundred steps or so.
        if not np.array_equal(wanted, self._sent[:count]):
            self._sent[:count] = wanted
            async_tensor_h2d(wanted, out=self._thin_spans[:count])
        request = self._request[:count]
        if self._empty is not None:
            request, seq_len = self._empty.skip(self._rule, evicted, seq_len, row_entries)
        return Rows(slice(0, count), request, seq_len, self._thin_spans[:count])


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
