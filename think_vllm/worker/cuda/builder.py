"""Prepare one step on a GPU: what every layer of a group shares.

Everything is decided on the host, from lengths that vLLM has there: exact ones, since drafted
tokens are refused. Nothing here waits for the GPU.

A batch of single tokens past their prompts may run as a full CUDA graph, which keeps addresses.
So its rows live in buffers of the builder, vLLM's own lengths and block table are used where
they are, and spans that are due are compacted here, ahead of the graph.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from csrc_triton.compact import compact_spans, compact_workspace
from think_vllm.errors import ThinkError
from think_vllm.hooks import metrics, model_runner
from think_vllm.hooks.engine import selected_engine
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.spans import RowLimits
from think_vllm.worker.channel_selection import count_sources
from think_vllm.worker.cuda.eviction import EmptySpans, skip_evicted
from think_vllm.worker.cuda.metadata import (
    DueSpans,
    Rows,
    StepParts,
    WaveParts,
    to_device,
    with_pages,
)
from think_vllm.worker.cuda.state import GroupState
from think_vllm.worker.cuda.step_tensors import (
    StepSlots,
    due_spans,
    keep_dense,
    keeps_channels,
    step_parts,
)
from think_vllm.worker.cuda.warmup import warm_up_layers
from think_vllm.worker.eviction_step import Pack, take_packs, watch
from think_vllm.worker.step import Int64Array, Prefill, Step
from think_vllm.worker.step_builder import leading_thin_spans, sort_step
from think_vllm.worker.token_selection import table_of_entries


@dataclass(frozen=True)
class ThinkCUDAMetadata:
    """One step, shared by the layers of a group.

    Args:
        block_table: int32 [num_reqs, width]. Blocks of each request.
        max_context: Tokens of the longest context, at most.
        state: What layers remember of requests.
        workspace: For compaction.
        parts: The sorted step.
        wave_table: The block table that rows of queries past their prompts are of.
        seq_len: int32 [num_reqs]. Tokens of each request at the end of the step.
        known: Ids of the requests that the runner knows.
    """

    block_table: torch.Tensor
    max_context: int
    state: GroupState
    workspace: torch.Tensor
    parts: StepParts
    wave_table: torch.Tensor
    seq_len: torch.Tensor
    known: Container[str] = ()


class ThinkCUDAMetadataBuilder(AttentionMetadataBuilder[ThinkCUDAMetadata]):
    """Builds ``ThinkCUDAMetadata``."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Single-token queries first: prompt queries are then neighbours as a rule.
        self._init_reorder_batch_threshold(1)
        engine = selected_engine()
        self.plan = engine.plan
        if not isinstance(kv_cache_spec, ThinKVCacheSpec) or kv_cache_spec.rule != self.plan.rule:
            raise ThinkError(
                f"ThinkCUDAMetadataBuilder: the cache was laid out as {kv_cache_spec}, "
                f"the plan is {self.plan.rule}"
            )
        count_cached = partial(leading_thin_spans, self.plan.rule)
        model_runner.watch_runner(
            vllm_config, self.plan.rule, count_cached if engine.thin_prefixes else None
        )
        metrics.watch_runner(vllm_config)
        rows = vllm_config.scheduler_config.max_num_seqs
        self.state = GroupState(
            layer_names,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            self.plan.kept_channels,
            rows,
            device,
            sources=count_sources(self.plan),
        )
        self._read_tables: set[int] = set()
        self._workspace = compact_workspace(self.plan, device)
        self._addresses: tuple[int, ...] = ()
        self._layers = torch.zeros(len(layer_names), dtype=torch.int64, device=device)
        self._request = torch.arange(rows, dtype=torch.int32, device=device)
        self._thin_spans = torch.zeros(rows, dtype=torch.int32, device=device)
        self._thin_spans_sent = np.zeros(rows, np.int32)
        self._empty = EmptySpans(rows, device) if self.plan.config.evicts else None
        if device.type == "cuda":
            # Here, because vLLM builds this before it reports healthy.
            context = vllm_config.compilation_config.static_forward_context
            impls = [context[name].impl for name in layer_names]
            warm_up_layers(self.plan, impls, kv_cache_spec.dtype, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ThinkCUDAMetadata:
        """Sort the batch, send what the layers need, and compact ahead of decode batches."""
        common = common_attn_metadata
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        seq_len = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        rows = model_runner.step_rows()
        if rows is None:
            self._forget_batch()
            step = _dummy_step(query_start)
            parts = step_parts(step, StepSlots(), self.plan.rule, self.plan.chooses_per_span)
            return self._prompt_step(common, parts)
        count = rows.prompt_lens.size
        step = sort_step(
            self.plan.rule,
            self.plan.observation_window,
            query_start[: count + 1],
            seq_len[:count],
            rows.prompt_lens,
            rows.cached_spans,
            rows.own,
        )
        evicted = self.plan.rule.evicted_spans_array(
            rows.prompt_lens, RowLimits.of(self.plan.rule, rows.own, count)
        )
        packs = [
            take_packs(self.plan.rule, wave, rows.prompt_lens, evicted, rows.request_ids)
            for wave in step.waves
        ]
        if not self.plan.rule.shrinks:
            keep_dense(step.waves, evicted)
        slots = self._find_slots(step, rows, packs)
        if _is_decode(step, count, query_start):
            (wave,) = step.waves
            self._pack(common.block_table_tensor, _packing(packs[0], slots))
            self._compact(common.block_table_tensor, due_spans(wave, slots))
            return self._decode(common, wave.thin_spans, evicted)
        parts = step_parts(step, slots, self.plan.rule, self.plan.chooses_per_span, evicted)
        if self._empty is not None:
            parts = self._evict(common, step, slots, rows, packs, parts, evicted)
        return replace(self._prompt_step(common, parts), known=rows.known)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ThinkCUDAMetadata:
        """Rows of a graph of single-token queries; vLLM fills in which, when it replays it."""
        none = np.zeros(0, np.int64)
        return self._decode(common_attn_metadata, none, none)

    def _forget_batch(self) -> None:
        """Let a graph that is replayed without requests read no block of the last batch's."""
        self._thin_spans.zero_()
        self._thin_spans_sent[:] = 0
        if self._empty is not None:
            self._empty.forget()

    def _prompt_step(self, common: CommonAttentionMetadata, parts: StepParts) -> ThinkCUDAMetadata:
        """Send a step that is no decode batch, and cut the block table to what it attends to."""
        metadata = self._metadata(common, to_device(parts, self.device))
        tables = metadata.block_table, metadata.wave_table
        return replace(metadata, parts=with_pages(metadata.parts, *tables, self.plan.block_size))

    def _metadata(self, common: CommonAttentionMetadata, parts: StepParts) -> ThinkCUDAMetadata:
        table = common.block_table_tensor
        return ThinkCUDAMetadata(
            wave_table=table if self._empty is None else table_of_entries(table),
            block_table=table,
            max_context=common.max_seq_len,
            state=self.state,
            workspace=self._workspace,
            parts=parts,
            seq_len=common.seq_lens[: table.shape[0]],
        )

    def _evict(
        self,
        common: CommonAttentionMetadata,
        step: Step,
        slots: StepSlots,
        rows: model_runner.StepRows,
        packs: Sequence[list[Pack]],
        parts: StepParts,
        evicted: Int64Array,
    ) -> StepParts:
        """Add what eviction has to do in a step, still on the host."""
        rule = self.plan.rule
        stride = common.block_table_tensor.stride(0)
        ends = step.prompt_ends
        waves = []
        for wave, packed in zip(parts.waves, packs, strict=True):
            packing = _packing(packed, slots)
            wave = replace(wave, packs=packing.packs, pack_slots=packing.pack_slots)
            waves.append(skip_evicted(rule, wave, evicted, stride))
        return replace(
            parts,
            waves=waves,
            watched=watch(
                rule,
                self.plan.evicting_window,
                step.prefill,
                rows.prompt_lens,
                evicted,
                rows.request_ids,
            ),
            ended_rows=[] if ends is None else ends.request.tolist(),
        )

    def _decode(
        self, common: CommonAttentionMetadata, thin_spans: Int64Array, evicted: Int64Array
    ) -> ThinkCUDAMetadata:
        """One query per request, padding rows behind them."""
        count = common.num_reqs
        wanted = np.zeros(count, np.int32)
        wanted[: thin_spans.size] = thin_spans - evicted
        # Spans fall due once in a hundred steps or so.
        if not np.array_equal(wanted, self._thin_spans_sent[:count]):
            self._thin_spans_sent[:count] = wanted
            async_tensor_h2d(wanted, out=self._thin_spans[:count])
        request, seq_len = self._request[:count], common.seq_lens[:count]
        if self._empty is not None:
            stride = common.block_table_tensor.stride(0)
            request, seq_len = self._empty.skip(self.plan.rule, evicted, seq_len, stride)
        rows = Rows(
            tokens=slice(0, count),
            request=request,
            seq_len=seq_len,
            thin_spans=self._thin_spans[:count],
        )
        return self._metadata(
            common, StepParts([], None, None, None, None, [WaveParts(None, rows, [])])
        )

    def _find_slots(
        self, step: Step, rows: model_runner.StepRows, packs: Sequence[list[Pack]]
    ) -> StepSlots:
        slots = StepSlots()
        if not self.plan.prunes:
            return slots
        state, ids, known = self.state, rows.request_ids, rows.known
        # Those of an earlier step have been read.
        for slot in self._read_tables:
            state.tables.pop(slot, None)
        self._read_tables.clear()
        for seen in step.observations:
            row, name = seen.request, ids[seen.request]
            if seen.resume_position is not None:
                # Whoever goes on gets it back below; layers read all of these before they write.
                slots.resumed[row] = state.windows.release(name)
            if seen.keep_position is not None:
                slots.kept[row] = state.windows.give(name, known)
        for ends in (step.prompt_ends, step.chunk_ends):
            if ends is not None:
                for row in ends.request[keeps_channels(ends)].tolist():
                    slots.requests[row] = state.requests.give(ids[row], known)
                    state.tables.pop(slots.requests[row], None)
        for wave, packed in zip(step.waves, packs, strict=True):
            for pack in packed:
                slots.requests[pack.row] = state.requests.give(pack.request, known)
            for row, span, kept in zip(wave.due_request, wave.due_span, wave.due_kept, strict=True):
                slots.requests[row] = state.requests.get(ids[row])
                # Spans of a prompt have a choice each; what fills later has one for all.
                prompt_spans = self.plan.rule.prompt_spans(int(rows.prompt_lens[row]))
                if self.plan.chooses_per_span and kept and span < prompt_spans:
                    slots.tables.add(row)
                    self._read_tables.add(slots.requests[row])
        state.grow()
        return slots

    def _pack(self, block_table: torch.Tensor, wave: WaveParts) -> None:
        """Pack what is kept of prompts in all layers, ahead of a graph."""
        if not wave.packs:
            return
        context = self.vllm_config.compilation_config.static_forward_context
        for name, index in self.state.index.items():
            layer = context[name]
            layer.impl.pack(layer.kv_cache, block_table, wave, self.state, index)

    def _compact(self, block_table: torch.Tensor, due: DueSpans | None) -> None:
        """Compact due spans in all layers, in one launch."""
        if due is None:
            return
        due = to_device(due, self.device)
        context = self.vllm_config.compilation_config.static_forward_context
        caches = [context[name].kv_cache for name in self.layer_names]
        addresses = tuple(cache.data_ptr() for cache in caches)
        if addresses != self._addresses:
            if len({cache.stride() for cache in caches}) > 1:
                raise RuntimeError("think-vllm: the caches of a group's layers differ in strides")
            self._addresses = addresses
            async_tensor_h2d(np.array(addresses, np.int64), out=self._layers)
        compact_spans(
            caches[0],
            block_table,
            due.request,
            due.span,
            self.state.due_channels_of_layers(due) if self.plan.prunes else None,
            self.plan,
            layers=self._layers,
            workspace=self._workspace,
        )


def _packing(packs: list[Pack], slots: StepSlots) -> WaveParts:
    """The packs of a wave, and where their channels are kept."""
    return WaveParts(None, None, [], packs, [slots.requests.get(pack.row, 0) for pack in packs])


def _is_decode(step: Step, count: int, query_start: Int64Array) -> bool:
    """Whether each request has exactly one query, past its prompt."""
    return step.prefill is None and bool(np.all(np.diff(query_start[: count + 1]) == 1))


def _dummy_step(query_start: Int64Array) -> Step:
    """Prompts that start: what vLLM runs to measure memory and to warm up has no requests.

    Nor has it a block table of its own, so nothing may be read from there, or cleared.
    """
    num_tokens = np.diff(query_start)
    rows = np.flatnonzero(num_tokens)
    thin_spans = np.zeros_like(rows)
    num_tokens = num_tokens[rows]
    prefill = Prefill(rows, query_start[rows], num_tokens, num_tokens, thin_spans)
    return Step(prefill, [], None, None, [])
