"""A layer's kernels on a GPU: Triton's (``csrc_triton/``), and vLLM's FlashAttention."""

from __future__ import annotations

import torch

from csrc_triton.compact import compact_spans
from csrc_triton.context import context_attention
from csrc_triton.decode import decode_attention
from csrc_triton.scores import add_query_energy, key_energy
from csrc_triton.store import clear_tails
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.cuda.flash import flash_pages, flash_prompts, load_flash
from think_vllm.worker.device import Blocks, Kernels, LayerCall
from think_vllm.worker.metadata_builder import ThinkMetadata
from think_vllm.worker.step_tensors import Chunks, KeyRanges, Rows


class CUDAKernels(Kernels):
    """Kernels of one layer on a GPU. Nothing waits for the device."""

    form = BlockForm.GPU

    def __init__(self, plan: BlockPlan, scale: float, logits_soft_cap: float) -> None:
        super().__init__(plan, scale, logits_soft_cap)
        self._flash = load_flash(plan.head_size, logits_soft_cap)

    def begin_step(self, kv_cache: torch.Tensor, metadata: ThinkMetadata) -> None:
        """Clear what lies behind contexts that FlashAttention reads from the cache."""
        reads_pages = any(chunks.prepared is not None for chunks in metadata.tensors.chunks())
        if self._flash is not None and reads_pages:
            # All tokens of the step are stored: what lies behind them is unused.
            clear_tails(kv_cache, metadata.block_table, metadata.seq_len, self.plan)

    def attend_chunks(
        self, call: LayerCall, table: torch.Tensor, chunks: Chunks, out: torch.Tensor
    ) -> None:
        """Attend by FlashAttention, but where thin spans are seen."""
        query = call.query[chunks.tokens]
        if chunks.fresh and self._flash is not None:
            flash_prompts(
                self._flash,
                query,
                call.key[chunks.tokens],
                call.value[chunks.tokens],
                chunks.starts,
                chunks.max_query_len,
                self.scale,
                self.logits_soft_cap,
                out,
            )
        elif chunks.prepared is not None and self._flash is not None:
            flash_pages(
                self._flash,
                query,
                call.kv_cache,
                chunks.prepared,
                chunks.starts,
                chunks.seq_len,
                chunks.max_query_len,
                chunks.max_seq_len,
                self.scale,
                self.logits_soft_cap,
                out,
            )
        else:
            context_attention(
                query,
                call.kv_cache,
                table,
                chunks.starts,
                chunks.seq_len,
                chunks.request,
                self.plan,
                self.scale,
                out,
                chunks.max_query_len,
                logits_soft_cap=self.logits_soft_cap,
                thin_spans=chunks.thin_spans,
            )

    def attend_rows(
        self, query: torch.Tensor, blocks: Blocks, rows: Rows, out: torch.Tensor, max_context: int
    ) -> None:
        """See ``decode_attention``."""
        assert rows.thin_spans is not None
        decode_attention(
            query,
            *blocks,
            rows.request,
            rows.seq_len,
            rows.thin_spans,
            self.plan,
            self.scale,
            out,
            logits_soft_cap=self.logits_soft_cap,
            max_context=max_context,
        )

    def add_query_energy(
        self, source: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, energy: torch.Tensor
    ) -> None:
        """See ``csrc_triton/scores.py``."""
        add_query_energy(source, begin, end, energy)

    def key_energy(self, blocks: Blocks, keys: KeyRanges) -> torch.Tensor:
        """See ``csrc_triton/scores.py``."""
        tasks = keys.request, keys.num_tokens
        return key_energy(*blocks, *tasks, self.plan, keys.max_tokens, keys.first_block)

    def compact_spans(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        request: torch.Tensor,
        span: torch.Tensor,
        channels: torch.Tensor | None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """See ``csrc_triton/compact.py``."""
        compact_spans(
            kv_cache, block_table, request, span, channels, self.plan, workspace=workspace
        )
