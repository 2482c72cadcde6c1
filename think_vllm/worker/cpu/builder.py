"""Prepare one step on the CPU: what every layer of a group shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from think_vllm.errors import ThinkError
from think_vllm.hooks import metrics, model_runner, prompt_lengths
from think_vllm.hooks.engine import selected_engine
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.kernels.cpu.decode import DecodeRows
from think_vllm.plan.spans import RowLimits
from think_vllm.worker.cpu.dense import dense_isa
from think_vllm.worker.cpu.eviction import skip_evicted
from think_vllm.worker.cpu.metadata import (
    PrefillPart,
    QueryRows,
    ThinkCPUMetadata,
    WaveRows,
    prefill_common,
    split_prefill,
    wave_rows,
)
from think_vllm.worker.cpu.scratch import BLOCK_SIZE, PromptScratch
from think_vllm.worker.cpu.warmup import warm_up
from think_vllm.worker.eviction_step import take_packs, watch
from think_vllm.worker.loss_guard import begin_guard, take_verdicts
from think_vllm.worker.step import Int64Array, Prefill, Step
from think_vllm.worker.step_builder import leading_thin_spans, sort_step
from think_vllm.worker.token_selection import table_of_entries
from think_vllm.worker.tokens import token_range

#: Of a step in which nothing is due, and of one that only decodes.
_NONE_DUE, _NONE_KEPT = np.zeros(0, np.int32), np.zeros(0, np.bool_)
_NOTHING_ELSE = Step(None, [], None, None, [])


class ThinkCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds ``ThinkCPUMetadata`` for layers with thin blocks, vLLM's own for others."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Single-token queries first: prompt queries are then neighbours as a rule.
        self._init_reorder_batch_threshold(1)
        self.thin = isinstance(kv_cache_spec, ThinKVCacheSpec)
        if not self.thin:
            return
        self.plan = selected_engine().plan
        if kv_cache_spec.rule != self.plan.rule:
            raise ThinkError(
                f"ThinkCPUMetadataBuilder: the cache was laid out for {kv_cache_spec.rule}, "
                f"the plan is {self.plan.rule}"
            )
        metrics.watch_runner(vllm_config, take_verdicts if self.plan.guards else None)
        # For fresh prompts: vLLM's own builder for blocks of its own default size.
        self._fresh = CPUAttentionMetadataBuilder(
            replace(kv_cache_spec, block_size=BLOCK_SIZE), layer_names, vllm_config, device
        )
        # Thin blocks are made from the plain dense form, so AMX and NEON packings are out.
        self.isa = dense_isa(self.dtype, self.head_dim, self.block_size)
        self._set_isa_to_layers(layer_names)
        self._scratch = None
        if self._fresh.isa != self.isa:
            self._scratch = PromptScratch(
                self.num_kv_heads, self.head_dim, self.dtype, self._fresh.isa
            )
        max_rows = vllm_config.scheduler_config.max_num_seqs
        self._every_row = np.arange(max_rows, dtype=np.int32)
        self._no_spans = np.zeros(max_rows, np.int32)
        self._may_hit_thin = bool(
            vllm_config.cache_config.enable_prefix_caching and kv_cache_spec.thin_prefixes
        )
        names_rows = self.plan.config.evicts or self.plan.guards
        model_runner.watch_runner(vllm_config, self.plan.rule, None, every_step=names_rows)
        begin_guard(self.plan.config.kv_prune_max_loss if self.plan.guards else None)
        # Here, because vLLM builds this before it reports healthy: nothing compiles later.
        warm_up(self.dtype, self.num_heads, self.num_kv_heads, self.plan)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """Sort the batch and prepare each part's arguments."""
        common = common_attn_metadata
        if not self.thin:
            return super().build(common_prefix_len, common, fast_build)
        metadata = self._build_decode(common)
        if metadata is not None:
            return metadata
        prompt_lens = prompt_lengths.prompt_lens(common).numpy().astype(np.int64)
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        seq_lens = common.seq_lens.numpy().astype(np.int64)
        computed = seq_lens - np.diff(query_start)
        found = model_runner.step_rows()
        step = sort_step(
            self.plan.rule,
            self.plan.observation_window,
            query_start,
            seq_lens,
            prompt_lens,
            leading_thin_spans(self.plan.rule, common.block_table_tensor.numpy(), computed),
            None if found is None else found.own,
        )
        dense, context = split_prefill(step.prefill)
        metadata = ThinkCPUMetadata(
            step=step,
            block_table=common.block_table_tensor,
            prompt_lens=prompt_lens,
            prefill=self._build_prefill(common, dense),
            context=context,
            waves=[] if self.plan.config.evicts else [wave_rows(wave) for wave in step.waves],
            wave_table=common.block_table_tensor,
            names=() if found is None else found.request_ids,
        )
        return self._evict(metadata) if self.plan.config.evicts else metadata

    def _evict(self, metadata: ThinkCPUMetadata) -> ThinkCPUMetadata:
        """Add what eviction has to do in a step."""
        rule, prompt_lens, found = self.plan.rule, metadata.prompt_lens, model_runner.step_rows()
        if found is None:
            raise RuntimeError("think-vllm: a step of requests that no model runner has announced")
        names = found.request_ids
        evicted = rule.evicted_spans_array(
            prompt_lens, RowLimits.of(rule, found.own, prompt_lens.size)
        )
        packs = [
            take_packs(rule, wave, prompt_lens, evicted, names) for wave in metadata.step.waves
        ]
        waves = [
            replace(wave_rows(wave), packs=packed)
            for wave, packed in zip(metadata.step.waves, packs, strict=True)
        ]
        return replace(
            metadata,
            waves=[
                replace(wave, queries=self._skip(wave.queries, metadata, evicted)) for wave in waves
            ],
            wave_table=table_of_entries(metadata.block_table),
            watched=watch(
                rule,
                self.plan.evicting_window,
                metadata.step.prefill,
                prompt_lens,
                evicted,
                names,
            ),
            known=found.known,
        )

    def _skip(
        self, queries: QueryRows, metadata: ThinkCPUMetadata, evicted: Int64Array
    ) -> QueryRows:
        stride = metadata.block_table.stride(0)
        rows = skip_evicted(self.plan.rule, queries.rows, evicted, stride)
        return replace(queries, rows=rows)

    def _build_decode(self, common: CommonAttentionMetadata) -> ThinkCPUMetadata | None:
        """The common step, in few operations: one query per request, and no span is due.

        Returns:
            What ``sort_step`` would lead to; None for any other step.
        """
        rule = self.plan.rule
        if common.max_query_len != 1 or not (rule.prune_decode or rule.budget_spans):
            return None
        seq_len = common.seq_lens.numpy()
        prompt_len = prompt_lengths.prompt_lens(common).numpy()
        # The first query past a prompt is at position P, so it has P + 1 tokens.
        if (seq_len <= prompt_len + rule.delay_prompt).any():
            return None
        limits = RowLimits.of(rule, model_runner.own_rules(), seq_len.size)
        if rule.prune_decode:
            recent = rule.recent_window if limits is None else limits.recent_window
            spans, rest = np.divmod(seq_len - (1 + recent), rule.span_tokens)
            if not rest.all():
                return None  # a position that a span is due at
        else:
            spans = rule.prompt_spans_array(prompt_len, limits)
        block_table, least = common.block_table_tensor, self._no_spans[: seq_len.size]
        if self._may_hit_thin:
            computed = seq_len.astype(np.int64) - 1
            least = leading_thin_spans(rule, block_table.numpy(), computed)
        rows = DecodeRows(
            request=self._every_row[: seq_len.size],
            seq_len=seq_len.astype(np.int32, copy=False),
            thin_spans=np.maximum(spans, least).astype(np.int32, copy=False),
        )
        table = block_table
        if rule.budget_spans is not None:
            evicted = rule.evicted_spans_array(prompt_len, limits)
            rows = skip_evicted(rule, rows, evicted, block_table.stride(0))
            table = table_of_entries(block_table)
        queries = QueryRows(slice(0, seq_len.size), rows)
        wave = WaveRows(_NONE_DUE, _NONE_DUE, _NONE_KEPT, queries)
        return ThinkCPUMetadata(_NOTHING_ELSE, block_table, prompt_len, [], None, [wave], table)

    def _build_prefill(
        self, common: CommonAttentionMetadata, prefill: Prefill | None
    ) -> list[PrefillPart]:
        """Prompts that start in this step apart from those that go on."""
        if prefill is None:
            return []
        fresh = np.zeros(prefill.request.size, np.bool_)
        parts = []
        if self._scratch is not None:
            fresh = prefill.seq_len == prefill.num_tokens
        if self._scratch is not None and fresh.any():
            chosen = prefill.choose(fresh)
            table = self._scratch.place(chosen.num_tokens)
            metadata = self._fresh.build(0, prefill_common(common, chosen, table))
            parts.append(PrefillPart(metadata, token_range(chosen.tokens()), self._scratch, []))
        if not fresh.all():
            chosen = prefill.choose(~fresh)
            table = common.block_table_tensor[torch.from_numpy(chosen.request)]
            metadata = super().build(0, prefill_common(common, chosen, table))
            # The step may have stored generated tokens behind the prompt's last one already.
            stored = common.seq_lens.numpy()[chosen.request]
            last = (chosen.seq_len - 1) // self.block_size
            held = stored - last * self.block_size
            tails = [
                (int(table[row, last[row]]), int(held[row]))
                for row in np.flatnonzero(held < self.block_size)
            ]
            parts.append(PrefillPart(metadata, token_range(chosen.tokens()), None, tails))
        return parts
