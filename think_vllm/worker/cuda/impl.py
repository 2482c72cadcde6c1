"""One layer's attention on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config

from csrc_triton.compact import compact_spans
from csrc_triton.context import context_attention
from csrc_triton.decode import decode_attention
from csrc_triton.scores import add_query_energy, key_energy
from csrc_triton.store import clear_tails, store_dense
from think_vllm.hooks.engine import remember_plan
from think_vllm.worker.channel_selection import Chooser
from think_vllm.worker.cuda.builder import ThinkCUDAMetadata
from think_vllm.worker.cuda.eviction import CUDAEvictor
from think_vllm.worker.cuda.flash import flash_pages, flash_prompts, load_flash
from think_vllm.worker.cuda.layer import CUDALayerImpl, refuse_output_scales
from think_vllm.worker.cuda.metadata import (
    Chunks,
    DueSpans,
    EndedParts,
    Observed,
    Rows,
    WaveParts,
)
from think_vllm.worker.cuda.state import GroupState
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.tokens import put_back


class ThinkCUDAImpl(CUDALayerImpl[ThinkCUDAMetadata]):
    """Attention over thin and dense blocks; see ``worker/step.py`` for the order of work."""

    who = "thin KV blocks"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        config = get_current_vllm_config()
        self.plan = remember_plan(config)
        # Of which layer they are, the first forward pass says, vLLM's own at start-up.
        self._heads = rank_heads(config, self.num_kv_heads, self.head_size)
        self._chooser: Chooser | None = None
        self.evictor = None
        if self.plan.config.evicts:
            self.evictor = CUDAEvictor(self.plan, self.scale, self.logits_soft_cap, None)
        self._flash = load_flash(self.head_size, self.logits_soft_cap)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store new keys and values densely.

        Args:
            layer: vLLM's attention layer.
            key: [num_tokens, Hk, D], perhaps with padding behind.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            slot_mapping: int64 [num_tokens]. Negative for padding.
        """
        count = slot_mapping.shape[0]
        store_dense(key[:count], value[:count], kv_cache, slot_mapping, self.plan)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, and compact what has become old.

        Args:
            layer: vLLM's attention layer.
            query: [num_tokens, Hq, D].
            key: [num_tokens, Hk, D]. Stored densely before this call.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: [num_blocks, Hk, N, 2 * D]. Compacted in place.
            attn_metadata: Of this step; None while vLLM profiles.
            output: [num_tokens, Hq, D]. Written for every query of the step.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            ``output``.
        """
        refuse_output_scales(output_scale, output_block_scale)
        if self._chooser is None:
            self._chooser = Chooser(self.plan, self._heads.of_layer(layer.layer_name))
        if attn_metadata is None:
            return output.fill_(0)
        metadata: ThinkCUDAMetadata = attn_metadata
        parts = metadata.parts
        if self._flash is not None and parts.reads_pages:
            # All tokens of the step are stored: what lies behind them is nobody's.
            clear_tails(kv_cache, metadata.block_table, metadata.seq_len, self.plan)
        for chunks in parts.prompts:
            table = metadata.block_table
            self._attend_chunks(query, key, value, kv_cache, table, chunks, output)
        # Only steps of prompts and of resumed requests have state to see to here.
        index = metadata.state.index[layer.layer_name]
        for watched, observed, ended in (
            (parts.watched, parts.observed, parts.prompt_ends),
            ([], parts.chunk_observed, parts.chunk_ends),
        ):
            energy = None
            if observed is not None:
                energy = self._observe(query, output, observed, metadata.state.energy[index])
            if watched:
                self._watch(query, kv_cache, metadata, energy)
            if ended is not None:
                self._end(kv_cache, metadata, ended, energy, index)
        for wave in parts.waves:
            if wave.packs:
                self.pack(kv_cache, metadata.block_table, wave, metadata.state, index)
            if wave.due is not None:
                self._compact(kv_cache, metadata, index, wave.due)
            if wave.rows is not None:
                self._attend_rows(query, kv_cache, metadata, wave.rows, output)
            for chunks in wave.chunks:
                table = metadata.wave_table
                self._attend_chunks(query, key, value, kv_cache, table, chunks, output)
        return output

    def _watch(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: ThinkCUDAMetadata,
        energy: torch.Tensor | None,
    ) -> None:
        """Let the evictor see prompt queries, and the observation windows that end here."""
        assert self.evictor is not None
        parts, ended = metadata.parts, {}
        if energy is not None:
            # A sum stands for the mean over the window: the order of channels is the same.
            ended = dict(zip(parts.ended_rows, energy.transpose(0, 1), strict=True))
        table = metadata.block_table
        self.evictor.watch(query, kv_cache, table, parts.watched, ended, metadata.known)

    def pack(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        wave: WaveParts,
        state: GroupState,
        index: int,
    ) -> None:
        """Pack what is kept of prompts, and keep their channels for spans that fall due later.

        Args:
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            block_table: int32 [num_reqs, width].
            wave: With the prompts.
            state: Of the layers. Written.
            index: Of this layer.
        """
        assert self.evictor is not None
        chosen = self.evictor.pack(kv_cache, block_table, wave.packs, self._chooser)
        for slot, channels in zip(wave.pack_slots, chosen, strict=True):
            if channels is not None:
                state.channels[index, slot] = channels

    def _attend_chunks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        chunks: Chunks,
        output: torch.Tensor,
    ) -> None:
        where = chunks.tokens
        answer = output[where]  # a view for a slice, a copy for indices
        if chunks.fresh and self._flash is not None:
            flash_prompts(
                self._flash,
                query[where],
                key[where],
                value[where],
                chunks.starts,
                chunks.max_query_len,
                self.scale,
                self.logits_soft_cap,
                answer,
            )
        elif chunks.pages is not None and self._flash is not None:
            flash_pages(
                self._flash,
                query[where],
                kv_cache,
                chunks.pages,
                chunks.starts,
                chunks.seq_len,
                chunks.max_query_len,
                chunks.max_seq_len,
                self.scale,
                self.logits_soft_cap,
                answer,
            )
        else:
            context_attention(
                query[where],
                kv_cache,
                block_table,
                chunks.starts,
                chunks.seq_len,
                chunks.request,
                self.plan,
                self.scale,
                answer,
                chunks.max_query_len,
                logits_soft_cap=self.logits_soft_cap,
                thin_spans=chunks.thin_spans,
            )
        put_back(output, where, answer)

    def _observe(
        self, query: torch.Tensor, output: torch.Tensor, observed: Observed, kept: torch.Tensor
    ) -> torch.Tensor:
        """Add up observation windows; return the complete ones, float32 [S, n, Hk, D]."""
        assert self._chooser is not None
        sources = self._chooser.sources(query, output)
        energy = kept.new_zeros(len(sources), observed.begin.numel(), *kept.shape[2:])
        if observed.resumed is not None:
            energy[:, observed.resumed.index] = kept[observed.resumed.slot].transpose(0, 1)
        for source, total in zip(sources, energy, strict=True):
            add_query_energy(source, observed.begin, observed.end, total)
        if observed.kept is not None:
            kept[observed.kept.slot] = energy[:, observed.kept.index].transpose(0, 1)
        return energy[:, observed.ended]

    def _end(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkCUDAMetadata,
        ended: EndedParts,
        energy: torch.Tensor | None,
        index: int,
    ) -> None:
        """Choose the channels of prompts or chunks that end here, and compact their spans."""
        channels = None
        if energy is not None:
            channels = self._choose_channels(kv_cache, metadata, ended, energy)
            if ended.kept is not None:
                metadata.state.channels[index, ended.kept.slot] = channels[ended.kept.index]
            for slot, begin, count in ended.tables:
                tables = metadata.state.tables.setdefault(slot, {})
                tables[index] = channels[begin : begin + count]
            channels = channels[ended.span_choice]
        compact_spans(
            kv_cache,
            metadata.block_table,
            ended.span_request,
            ended.span,
            channels,
            self.plan,
            workspace=metadata.workspace,
        )

    def _choose_channels(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkCUDAMetadata,
        ended: EndedParts,
        energy: torch.Tensor,
    ) -> torch.Tensor:
        """Channels that are kept from here on: uint8 [m, Hk, K]."""
        assert self._chooser is not None
        # A sum stands for the mean over the window: the order of channels is the same.
        windows = energy.transpose(0, 1)
        if ended.window is not None:
            windows = windows[ended.window]
        keys = None
        if self._chooser.uses_keys:
            keys = key_energy(
                kv_cache,
                metadata.block_table,
                ended.request,
                ended.num_tokens,
                self.plan,
                ended.max_tokens,
                ended.first_block,
            )
        choice = self._chooser.choose(windows, keys)
        choice.report(ended.final)
        return choice.channels

    def _compact(
        self, kv_cache: torch.Tensor, metadata: ThinkCUDAMetadata, index: int, due: DueSpans
    ) -> None:
        """Compact spans that have fallen due, with their request's channels."""
        channels = metadata.state.due_channels(due, index) if self.plan.prunes else None
        compact_spans(
            kv_cache,
            metadata.block_table,
            due.request,
            due.span,
            channels,
            self.plan,
            workspace=metadata.workspace,
        )

    def _attend_rows(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: ThinkCUDAMetadata,
        rows: Rows,
        output: torch.Tensor,
    ) -> None:
        where = rows.tokens
        answer = output[where]
        decode_attention(
            query[where],
            kv_cache,
            metadata.wave_table,
            rows.request,
            rows.seq_len,
            rows.thin_spans,
            self.plan,
            self.scale,
            answer,
            logits_soft_cap=self.logits_soft_cap,
            max_context=metadata.max_context,
        )
        put_back(output, where, answer)
