"""Prepare one step: what every layer of a group shares.

Everything is decided on the host, from lengths that vLLM has there: exact ones, since drafted
tokens are rejected. Nothing here waits for the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from think_vllm.errors import ThinkError
from think_vllm.hooks import metrics, model_runner
from think_vllm.hooks.engine import selected_engine
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.spans import RowLimits
from think_vllm.worker.channel_selection import count_sources
from think_vllm.worker.eviction_step import Repack, find_accumulations, take_repacks
from think_vllm.worker.loss_limit import begin_loss_limit, take_decisions
from think_vllm.worker.state import GroupState
from think_vllm.worker.steady_step import steady_spans
from think_vllm.worker.step import DecodePass, Int64Array, Prefill, Step
from think_vllm.worker.step_sorter import leading_thin_spans, sort_step
from think_vllm.worker.step_tensors import PassTensors, StepTensors
from think_vllm.worker.step_writer import (
    StepSlots,
    keep_dense,
    keeps_channels,
    skip_evicted,
    write_step,
)
from think_vllm.worker.token_selection import table_of_entries

#: Of a step that reads and writes no state.
NO_SLOTS = StepSlots()


@dataclass(frozen=True)
class ThinkMetadata:
    """One step, shared by the layers of a group."""

    block_table: torch.Tensor  # int32 [num_reqs, width]. Blocks of each request
    max_context: int  # tokens of the longest context, at most
    state: GroupState  # what layers remember of requests
    tensors: StepTensors  # the sorted step
    decode_table: torch.Tensor  # the block table that rows of queries past their prompts are of
    seq_len: torch.Tensor  # int32 [num_reqs]. Tokens of each request at the end of the step
    workspace: torch.Tensor | None = None  # for compaction, if the device's kernel needs one
    known: Container[str] = ()  # ids of the requests that the runner knows


class ThinkMetadataBuilder(AttentionMetadataBuilder[ThinkMetadata]):
    """Builds ``ThinkMetadata``."""

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
                f"{type(self).__name__}: the cache was laid out as {kv_cache_spec}, "
                f"the plan is {self.plan.rule}"
            )
        count_cached = None
        if engine.thin_prefixes and vllm_config.cache_config.enable_prefix_caching:
            count_cached = partial(leading_thin_spans, self.plan.rule)
        model_runner.track_rows(vllm_config, self.plan.rule, count_cached)
        metrics.report_metrics(vllm_config, take_decisions if self.plan.limits_loss else None)
        begin_loss_limit(self.plan.config.kv_prune_max_loss if self.plan.limits_loss else None)
        self.state = GroupState(
            layer_names,
            kv_cache_spec.num_kv_heads,
            kv_cache_spec.head_size,
            self.plan.kept_channels,
            vllm_config.scheduler_config.max_num_seqs,
            device,
            sources=count_sources(self.plan),
        )
        self.workspace: torch.Tensor | None = None
        self._read_tables: set[int] = set()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ThinkMetadata:
        """Sort the batch, and prepare what the layers need."""
        common = common_attn_metadata
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        seq_len = common.seq_lens_cpu_upper_bound.numpy().astype(np.int64)
        rows = model_runner.step_rows()
        if rows is None:
            self.forget_batch()
            step = _dummy_step(query_start)
            tensors = write_step(step, StepSlots(), self.plan.rule, self.plan.selects_per_span)
            return self.prepare(common, tensors)
        # Those of an earlier step have been read.
        for slot in self._read_tables:
            self.state.tables.pop(slot, None)
        self._read_tables.clear()
        count, rule = rows.prompt_lens.size, self.plan.rule
        limits = RowLimits.of(rule, rows.own, count)
        evicted = rule.evicted_spans_array(rows.prompt_lens, limits)
        if common.max_query_len == 1 and query_start[count] == count:
            spans = steady_spans(rule, rows, seq_len[:count], limits)
            if spans is not None:
                decode = DecodePass(request=np.arange(count), thin_spans=spans)
                if not rule.shrinks:
                    keep_dense([decode], evicted)
                return self.build_decode(
                    common, decode, _repacking([], NO_SLOTS), NO_SLOTS, evicted
                )
        step = sort_step(
            rule,
            self.plan.observation_window,
            query_start[: count + 1],
            seq_len[:count],
            rows.prompt_lens,
            rows.cached_spans,
            rows.own,
        )
        repacks = [
            take_repacks(rule, decode, rows.prompt_lens, evicted, rows.request_ids)
            for decode in step.passes
        ]
        if not rule.shrinks:
            keep_dense(step.passes, evicted)
        slots = self._find_slots(step, rows, repacks)
        if _is_decode(step, count, query_start):
            (decode,) = step.passes
            return self.build_decode(common, decode, _repacking(repacks[0], slots), slots, evicted)
        tensors = write_step(
            step,
            slots,
            rule,
            self.plan.selects_per_span,
            evicted,
            rows.request_ids if self.plan.limits_loss else None,
        )
        if self.plan.config.evicts:
            tensors = self._evict(common, step, slots, rows, repacks, tensors, evicted)
        return replace(self.prepare(common, tensors), known=rows.known)

    def forget_batch(self) -> None:
        """Keep nothing of the last batch, for a run without requests."""

    @abstractmethod
    def prepare(self, common: CommonAttentionMetadata, tensors: StepTensors) -> ThinkMetadata:
        """Bring a step to the device, with what its kernels need of it.

        Args:
            common: The batch.
            tensors: On the host.
        """

    @abstractmethod
    def build_decode(
        self,
        common: CommonAttentionMetadata,
        decode: DecodePass,
        repacking: PassTensors,
        slots: StepSlots,
        evicted: Int64Array,
    ) -> ThinkMetadata:
        """The common step: one query per request, past its prompt.

        Args:
            common: The batch, perhaps with padding rows behind it.
            decode: Its only pass.
            repacking: The prompts that are repacked first.
            slots: Where requests' state is kept.
            evicted: int64 [num_reqs]. Empty spans of each request.
        """

    def metadata(self, common: CommonAttentionMetadata, tensors: StepTensors) -> ThinkMetadata:
        """What layers are given.

        Args:
            common: The batch.
            tensors: On the device.
        """
        table = common.block_table_tensor
        return ThinkMetadata(
            decode_table=table_of_entries(table) if self.plan.config.evicts else table,
            block_table=table,
            max_context=common.max_seq_len,
            state=self.state,
            workspace=self.workspace,
            tensors=tensors,
            seq_len=common.seq_lens[: table.shape[0]],
        )

    def _evict(
        self,
        common: CommonAttentionMetadata,
        step: Step,
        slots: StepSlots,
        rows: model_runner.StepRows,
        repacks: Sequence[list[Repack]],
        tensors: StepTensors,
        evicted: Int64Array,
    ) -> StepTensors:
        """Add what eviction has to do in a step, still on the host."""
        rule = self.plan.rule
        stride = common.block_table_tensor.stride(0)
        ends = step.finished_prompts
        passes = []
        for decode, repacked in zip(tensors.passes, repacks, strict=True):
            repacking = _repacking(repacked, slots)
            decode = replace(decode, repacks=repacking.repacks, repack_slots=repacking.repack_slots)
            passes.append(skip_evicted(rule, decode, evicted, stride))
        return replace(
            tensors,
            passes=passes,
            accumulations=find_accumulations(
                rule,
                self.plan.eviction_window,
                step.prefill,
                rows.prompt_lens,
                evicted,
                rows.request_ids,
            ),
            ended_rows=[] if ends is None else ends.request.tolist(),
        )

    def _find_slots(
        self, step: Step, rows: model_runner.StepRows, repacks: Sequence[list[Repack]]
    ) -> StepSlots:
        slots = StepSlots()
        if not self.plan.prunes:
            return slots
        state, ids, known = self.state, rows.request_ids, rows.known
        for seen in step.observations:
            row, name = seen.request, ids[seen.request]
            if seen.resume_position is not None:
                # What goes on gets it back below; layers read all of these before they write.
                slots.resumed[row] = state.windows.release(name)
            if seen.keep_position is not None:
                slots.kept[row] = state.windows.give(name, known)
        for ends in (step.finished_prompts, step.finished_chunks):
            if ends is not None:
                for row in ends.request[keeps_channels(ends)].tolist():
                    slots.requests[row] = state.requests.give(ids[row], known)
                    state.tables.pop(slots.requests[row], None)
        for decode, repacked in zip(step.passes, repacks, strict=True):
            for repack in repacked:
                slots.requests[repack.row] = state.requests.give(repack.request, known)
            for row, span, kept in zip(
                decode.due_request, decode.due_span, decode.due_kept, strict=True
            ):
                slots.requests[row] = state.requests.get(ids[row])
                # Spans of a prompt have a selection each; what fills later has one for all.
                prompt_spans = self.plan.rule.prompt_spans(int(rows.prompt_lens[row]))
                if self.plan.selects_per_span and kept and span < prompt_spans:
                    slots.tables.add(row)
                    self._read_tables.add(slots.requests[row])
        state.grow()
        return slots


def _repacking(repacks: list[Repack], slots: StepSlots) -> PassTensors:
    """The repacks of a pass, and where their channels are kept."""
    return PassTensors(
        None, None, [], repacks, [slots.requests.get(repack.row, 0) for repack in repacks]
    )


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
