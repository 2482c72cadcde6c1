"""A layer's kernels on CPUs: numba's (``think_vllm/kernels/cpu``), and vLLM's C++ for prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.cpu.decode import DecodeRows, decode_attention
from think_vllm.kernels.cpu.scoring import add_query_energy, key_energy
from think_vllm.metrics.rank import rank_report
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.cpu.dense import clear_tail
from think_vllm.worker.cpu.prompts import CachePrompts, ScratchPrompts
from think_vllm.worker.device import Blocks, Kernels, LayerCall
from think_vllm.worker.metadata_builder import ThinkMetadata
from think_vllm.worker.step_tensors import Chunks, KeyRanges, Rows

#: vLLM's ``CPUAttentionBackendImpl.forward`` of a layer.
PromptAttention = Callable[..., Any]


class CPUKernels(Kernels):
    """Kernels of one layer on the CPU.

    Args:
        prompt_attention: Serves prompt queries that see dense blocks only.
        others: Of ``Kernels``.
    """

    form = BlockForm.CPU

    def __init__(
        self,
        plan: BlockPlan,
        scale: float,
        logits_soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
        prompt_attention: PromptAttention | None = None,
    ) -> None:
        super().__init__(plan, scale, logits_soft_cap, sinks)
        self._prompt_attention = prompt_attention

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Add the time to the rank's report."""
        begin = time.perf_counter()
        yield
        rank_report().add_seconds(time.perf_counter() - begin)

    def begin_step(self, kv_cache: torch.Tensor, metadata: ThinkMetadata) -> None:
        """Clear the last blocks of prompts that vLLM's kernel reads from the cache."""
        for chunks in metadata.tensors.prompts:
            if isinstance(chunks.prepared, CachePrompts):
                for block, held in chunks.prepared.tails:
                    clear_tail(kv_cache, block, held)

    def attend_chunks(
        self, call: LayerCall, table: torch.Tensor, chunks: Chunks, out: torch.Tensor
    ) -> None:
        """Attend by vLLM's kernel where the builder has prepared that; else query by query."""
        query, prepared = call.query[chunks.tokens], chunks.prepared
        if isinstance(prepared, Rows):
            blocks = Blocks(call.kv_cache, table)
            self.attend_rows(query, blocks, prepared, out, chunks.max_seq_len)
            return
        assert self._prompt_attention is not None
        key, value, kv_cache = call.key[chunks.tokens], call.value[chunks.tokens], call.kv_cache
        if isinstance(prepared, ScratchPrompts):
            prepared.scratch.store(key, value)
            kv_cache = prepared.scratch.blocks
        self._prompt_attention(call.layer, query, key, value, kv_cache, prepared.metadata, out)

    def attend_rows(
        self, query: torch.Tensor, blocks: Blocks, rows: Rows, out: torch.Tensor, max_context: int
    ) -> None:
        """See ``decode_attention``."""
        assert rows.thin_spans is not None
        decode_attention(
            query,
            *blocks,
            DecodeRows(rows.request.numpy(), rows.seq_len.numpy(), rows.thin_spans.numpy()),
            self.plan,
            self.scale,
            out,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
        )

    def add_query_energy(
        self, source: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, energy: torch.Tensor
    ) -> None:
        """See ``kernels/cpu/scoring.py``."""
        windows = zip(begin.tolist(), end.tolist(), energy, strict=True)
        for first, last, total in windows:
            add_query_energy(source, first, last, total)

    def key_energy(self, blocks: Blocks, keys: KeyRanges) -> torch.Tensor:
        """See ``kernels/cpu/scoring.py``."""
        tasks = keys.request.numpy(), keys.num_tokens.numpy()
        return key_energy(*blocks, *tasks, self.plan, keys.first_block.numpy())

    def compact_spans(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        request: torch.Tensor,
        span: torch.Tensor,
        channels: torch.Tensor | None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See ``kernels/cpu/compaction.py``."""
        if channels is None:
            every = torch.arange(self.plan.head_size, dtype=torch.uint8)
            channels = every.repeat(request.numel(), kv_cache.shape[1], 1)
        compact_spans(kv_cache, block_table, request.numpy(), span.numpy(), channels, self.plan)
