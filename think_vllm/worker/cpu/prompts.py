"""Prompt queries on CPUs: vLLM's own C++ kernel, over the cache or over scratch blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata, CPUAttentionMetadataBuilder

from think_vllm.worker.cpu.scratch import BLOCK_SIZE, PromptScratch
from think_vllm.worker.step_tensors import Chunks, Rows


@dataclass(frozen=True)
class ScratchPrompts:
    """Prompts that start in a step, which attend to scratch blocks."""

    metadata: CPUAttentionMetadata  # vLLM's own
    scratch: PromptScratch  # the blocks, where layers store the prompts' keys and values


@dataclass(frozen=True)
class CachePrompts:
    """Prompts that attend to dense blocks of the cache."""

    metadata: CPUAttentionMetadata  # vLLM's own
    #: The block of each prompt's last query and the tokens stored in it, unless it is full.
    tails: list[tuple[int, int]]


class ScratchBuilder:
    """Builds vLLM's metadata for prompts that start in a step.

    Args:
        spec: Of dense blocks with whole heads; their size does not matter.
        layer_names: Of the group.
        vllm_config: Of the engine.
        device: The CPU.
    """

    def __init__(
        self, spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        spec = replace(spec, block_size=BLOCK_SIZE)
        self._builder = CPUAttentionMetadataBuilder(spec, layer_names, vllm_config, device)
        self.isa: str = self._builder.isa
        self._scratch = PromptScratch(
            spec.num_kv_heads, spec.head_size, self._builder.dtype, self.isa
        )

    def build(self, common: CommonAttentionMetadata, chunks: Chunks) -> ScratchPrompts:
        """Give each prompt blocks of its own.

        Args:
            common: The batch.
            chunks: Prompts without a computed token, of one step.
        """
        table = self._scratch.place(np.diff(chunks.starts.numpy()).astype(np.int64))
        return ScratchPrompts(
            self._builder.build(0, chunks_common(common, chunks, table)), self._scratch
        )


def cache_prompts(
    builder: CPUAttentionMetadataBuilder, common: CommonAttentionMetadata, chunks: Chunks
) -> CachePrompts:
    """Build vLLM's metadata for prompts that see dense blocks only.

    Args:
        builder: For blocks of the cache.
        common: The batch.
        chunks: The prompts.
    """
    table = common.block_table_tensor[chunks.request]
    return CachePrompts(
        builder.build(0, chunks_common(common, chunks, table)),
        _tails(table, common.seq_lens[chunks.request], chunks.seq_len, builder.block_size),
    )


def _tails(
    table: torch.Tensor, stored: torch.Tensor, seq_len: torch.Tensor, block_size: int
) -> list[tuple[int, int]]:
    # The step may have stored generated tokens behind a prompt's last one already.
    last = (seq_len - 1) // block_size
    held = stored - last * block_size
    rows: Sequence[int] = torch.nonzero(held < block_size).flatten().tolist()
    return [(int(table[row, last[row]]), int(held[row])) for row in rows]


def chunks_common(
    common: CommonAttentionMetadata, chunks: Chunks, block_table: torch.Tensor
) -> CommonAttentionMetadata:
    """The batch as if it held nothing but these queries.

    Args:
        common: The batch.
        chunks: Its queries.
        block_table: int32 [n, width]. Blocks of each of their requests.
    """
    return common.replace(
        query_start_loc=chunks.starts,
        query_start_loc_cpu=chunks.starts,
        seq_lens=chunks.seq_len,
        num_reqs=int(chunks.request.numel()),
        num_actual_tokens=int(chunks.starts[-1]),
        max_query_len=chunks.max_query_len,
        max_seq_len=chunks.max_seq_len,
        block_table_tensor=block_table,
    )


def each_query(chunks: Chunks) -> Rows:
    """Write each query of chunks as a row of its own.

    Args:
        chunks: In one run each, or all of them in token order.
    """
    starts = chunks.starts
    counts = starts.diff()
    first = chunks.seq_len - counts + 1 - starts[:-1]
    thin_spans = torch.zeros_like(counts) if chunks.thin_spans is None else chunks.thin_spans
    count = int(starts[-1])
    return Rows(
        tokens=chunks.tokens,
        request=chunks.request.repeat_interleave(counts),
        seq_len=first.repeat_interleave(counts) + torch.arange(count, dtype=torch.int32),
        thin_spans=thin_spans.repeat_interleave(counts),
    )
