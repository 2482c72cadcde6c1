"""One layer's attention on the CPU."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from think_vllm.hooks.engine import remember_plan
from think_vllm.kernels.cpu.compaction import compact_spans, read_channels
from think_vllm.kernels.cpu.decode import decode_attention
from think_vllm.kernels.cpu.scoring import add_query_energy, key_energy
from think_vllm.metrics.worker import rank_report
from think_vllm.worker.channel_selection import Chooser
from think_vllm.worker.cpu.dense import clear_tail
from think_vllm.worker.cpu.eviction import CPUEvictor
from think_vllm.worker.cpu.metadata import PrefillPart, QueryRows, ThinkCPUMetadata, WaveRows
from think_vllm.worker.cpu.state import LayerState
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.loss_guard import loss_guard
from think_vllm.worker.refusals import refuse_options
from think_vllm.worker.step import Choices, Ends, Observation
from think_vllm.worker.tokens import put_back


class ThinkCPUImpl(CPUAttentionBackendImpl):
    """Attention over thin and dense blocks; see ``worker/step.py`` for the order of work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_options(
            "thin KV blocks",
            (
                (self.alibi_slopes, "ALiBi position biases"),
                (self.kv_sharing_target_layer_name, "a KV cache shared between layers"),
            ),
        )
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        config = get_current_vllm_config()
        self.plan = remember_plan(config)
        self.state = LayerState()
        # Of which layer they are, the first forward pass says, vLLM's own at start-up.
        self._heads = rank_heads(config, self.num_kv_heads, self.head_size)
        self._chooser: Chooser | None = None
        self.evictor = None
        if self.plan.config.evicts:
            cap = self.logits_soft_cap or 0.0
            self.evictor = CPUEvictor(self.plan, self.scale, cap, self.sinks)

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
            output_scale: Not supported by CPU attention.
            output_block_scale: Not supported by CPU attention.

        Returns:
            ``output``.
        """
        if self._chooser is None:
            self._chooser = Chooser(self.plan, self._heads.of_layer(layer.layer_name))
        if not isinstance(attn_metadata, ThinkCPUMetadata):
            result: torch.Tensor = super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
            return result
        metadata = attn_metadata
        for part in metadata.prefill:
            self._prefill(layer, query, key, value, kv_cache, part, output)
        if metadata.context is not None:
            self._attend(query, kv_cache, metadata, metadata.context, output)
        step = metadata.step
        energies = self._observe(query, output, metadata, step.observations)
        if metadata.watched:
            self._watch(query, kv_cache, metadata, energies)
        if step.prompt_ends is not None:
            self._end(kv_cache, metadata, step.prompt_ends, energies)
        if step.chunk_ends is not None:
            energies = self._observe(query, output, metadata, step.chunk_ends.observations)
            self._end(kv_cache, metadata, step.chunk_ends, energies)
        for wave in metadata.waves:
            if self.evictor is not None and wave.packs:
                begin = time.perf_counter()
                self.evictor.pack(kv_cache, metadata.block_table, wave.packs, self._chooser)
                rank_report().add_seconds(time.perf_counter() - begin)
            self._compact_due(kv_cache, metadata, wave)
            self._attend(query, kv_cache, metadata, wave.queries, output)
        return output

    def _watch(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: ThinkCPUMetadata,
        energies: list[torch.Tensor],
    ) -> None:
        """Let the evictor see prompt queries, and the observation windows that end here."""
        assert self.evictor is not None
        begin = time.perf_counter()
        ends, means = metadata.step.prompt_ends, {}
        if ends is not None and energies:
            rows = zip(ends.request, ends.num_observed, energies, strict=True)
            means = {int(row): energy / int(observed) for row, observed, energy in rows}
        self.evictor.watch(
            query, kv_cache, metadata.block_table, metadata.watched, means, metadata.known
        )
        rank_report().add_seconds(time.perf_counter() - begin)

    def _prefill(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        part: PrefillPart,
        output: torch.Tensor,
    ) -> None:
        """Let vLLM's kernel serve prompt queries that see dense blocks only."""
        where = part.tokens
        for block, held in part.tails:
            clear_tail(kv_cache, block, held)
        if part.scratch is not None:
            part.scratch.store(key[where], value[where])
            kv_cache = part.scratch.blocks
        answer = output[where]
        super().forward(layer, query[where], key, value, kv_cache, part.metadata, answer)
        put_back(output, where, answer)

    def _observe(
        self,
        query: torch.Tensor,
        output: torch.Tensor,
        metadata: ThinkCPUMetadata,
        observations: list[Observation],
    ) -> list[torch.Tensor]:
        """Add up observation windows; return those that end here, float32 [S, Hk, D]."""
        assert self._chooser is not None
        sources, finished = self._chooser.sources(query, output), []
        for seen in observations:
            if seen.resume_position is None:
                shape = (len(sources), self.num_kv_heads, self.head_size)
                energy = torch.zeros(shape, dtype=torch.float32)
            else:
                block = self._block(metadata, seen.request, seen.resume_position)
                energy = self.state.take_energy(block)
            for source, total in zip(sources, energy, strict=True):
                add_query_energy(source, seen.begin, seen.end, total)
            if seen.keep_position is None:
                finished.append(energy)
            else:
                block = self._block(metadata, seen.request, seen.keep_position)
                self.state.keep_energy(block, energy)
        return finished

    def _end(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkCPUMetadata,
        ends: Ends,
        energies: list[torch.Tensor],
    ) -> None:
        """Choose the channels of prompts or chunks that end here, and compact their spans."""
        begin = time.perf_counter()
        choices = ends.choices(self.plan.rule, self.plan.chooses_per_span)
        channels = self._choose_channels(kv_cache, metadata, ends, choices, energies)
        which, span = ends.spans()
        if which.size:
            compact_spans(
                kv_cache,
                metadata.block_table,
                ends.request[which].astype(np.int32),
                span.astype(np.int32),
                channels[torch.from_numpy(choices.of_span)],
                self.plan,
            )
        if self.plan.prunes:
            for i in np.flatnonzero(ends.keeps):
                block = self._block(metadata, int(ends.request[i]), int(ends.num_tokens[i]) - 1)
                first = int(choices.begin[i])
                kept = channels[first : first + int(choices.count[i])]
                self.state.keep_channels(block, kept.clone())
        rank_report().add_seconds(time.perf_counter() - begin)

    def _choose_channels(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkCPUMetadata,
        ends: Ends,
        choices: Choices,
        energies: list[torch.Tensor],
    ) -> torch.Tensor:
        """Channels that are kept from here on: uint8 [m, Hk, K]."""
        if not self.plan.prunes:
            return self._all_channels(choices.end.size)
        assert self._chooser is not None
        observed = torch.from_numpy(ends.num_observed).view(-1, 1, 1, 1)
        windows = (torch.stack(energies) / observed)[torch.from_numpy(choices.end)]
        keys = None
        if self._chooser.uses_keys:
            keys = key_energy(
                kv_cache,
                metadata.block_table,
                ends.request[choices.end].astype(np.int32),
                choices.num_tokens.astype(np.int32),
                self.plan,
                choices.first_block.astype(np.int32),
            )
        choice = self._chooser.choose(windows, keys)
        counted = None
        if self.evictor is not None:
            # Where tokens are evicted, channels are chosen once more, for those that are kept.
            counted = torch.from_numpy(~ends.packed[choices.end])
        choice.report(counted)
        if self.plan.guards:
            names = [metadata.names[row] for row in ends.request[choices.end]]
            loss_guard().add(names, choice.kept_shares())
        return choice.channels

    def _all_channels(self, count: int) -> torch.Tensor:
        every = torch.arange(self.head_size, dtype=torch.uint8)
        return every.repeat(count, self.num_kv_heads, 1)

    def _compact_due(
        self, kv_cache: torch.Tensor, metadata: ThinkCPUMetadata, wave: WaveRows
    ) -> None:
        """Compact spans that have fallen due, with their request's channels."""
        if not wave.due_request.size or not self.plan.rule.shrinks:
            return
        begin = time.perf_counter()
        channels = self._due_channels(kv_cache, metadata, wave)
        compact_spans(
            kv_cache, metadata.block_table, wave.due_request, wave.due_span, channels, self.plan
        )
        rank_report().add_seconds(time.perf_counter() - begin)

    def _due_channels(
        self, kv_cache: torch.Tensor, metadata: ThinkCPUMetadata, wave: WaveRows
    ) -> torch.Tensor:
        """Channels of due spans, those of their request: uint8 [n, Hk, K]."""
        if not self.plan.prunes:
            return self._all_channels(wave.due_span.size)
        shape = (wave.due_span.size, self.num_kv_heads, self.plan.kept_channels)
        channels = torch.empty(shape, dtype=torch.uint8)
        kept = wave.due_kept
        if not kept.all():
            channels[torch.from_numpy(~kept)] = read_channels(
                kv_cache,
                metadata.block_table,
                wave.due_request[~kept],
                wave.due_span[~kept] - 1,
                self.plan,
            )
        for request in np.unique(wave.due_request[kept]):
            last = int(metadata.prompt_lens[request]) - 1
            # One choice for all of these spans, or one each.
            taken = self.state.take_channels(self._block(metadata, int(request), last))
            channels[torch.from_numpy(kept & (wave.due_request == request))] = taken
        return channels

    def _attend(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: ThinkCPUMetadata,
        queries: QueryRows,
        output: torch.Tensor,
    ) -> None:
        """Attend to thin and dense blocks."""
        part = output[queries.tokens]
        decode_attention(
            query[queries.tokens],
            kv_cache,
            metadata.wave_table,
            queries.rows,
            self.plan,
            self.scale,
            part,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
        )
        put_back(output, queries.tokens, part)

    def _block(self, metadata: ThinkCPUMetadata, request: int, position: int) -> int:
        return int(metadata.block_table[request, position // self.plan.block_size])
