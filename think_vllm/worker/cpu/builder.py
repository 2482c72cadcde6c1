"""Prepare one step on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder

from think_vllm.worker.cpu.dense import dense_isa
from think_vllm.worker.cpu.prompts import (
    CachePrompts,
    ScratchBuilder,
    ScratchPrompts,
    cache_prompts,
    each_query,
)
from think_vllm.worker.cpu.warmup import warm_up
from think_vllm.worker.metadata_builder import ThinkMetadata, ThinkMetadataBuilder
from think_vllm.worker.step import DecodePass, Int64Array
from think_vllm.worker.step_tensors import Chunks, PassTensors, Rows, StepTensors
from think_vllm.worker.step_writer import StepSlots, due_spans, skip_evicted


class ThinkCPUMetadataBuilder(ThinkMetadataBuilder):
    """Builds ``ThinkMetadata`` on the CPU."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        arguments = kv_cache_spec, layer_names, vllm_config, device
        scratch = ScratchBuilder(*arguments)
        # Behind that one: what it says to layers of the kernel family is overwritten.
        self._cache = _CacheBuilder(*arguments)
        self._scratch = None if scratch.isa == self._cache.isa else scratch
        max_rows = vllm_config.scheduler_config.max_num_seqs
        self._every_row = torch.arange(max_rows, dtype=torch.int32)
        # Here, because vLLM builds this before it reports healthy: nothing compiles later.
        cache = self._cache
        warm_up(cache.dtype, cache.num_heads, cache.num_kv_heads, self.plan)

    def prepare(self, common: CommonAttentionMetadata, tensors: StepTensors) -> ThinkMetadata:
        """Build vLLM's own metadata for prompts that see dense blocks only."""
        prepared = tensors.prepare(lambda chunks: self._prepare_prompts(common, chunks), each_query)
        return self.metadata(common, prepared)

    def _prepare_prompts(
        self, common: CommonAttentionMetadata, chunks: Chunks
    ) -> ScratchPrompts | CachePrompts | Rows:
        if chunks.thin_spans is not None:
            return each_query(chunks)
        if chunks.fresh and self._scratch is not None:
            return self._scratch.build(common, chunks)
        return cache_prompts(self._cache, common, chunks)

    def build_decode(
        self,
        common: CommonAttentionMetadata,
        decode: DecodePass,
        repacking: PassTensors,
        slots: StepSlots,
        evicted: Int64Array,
    ) -> ThinkMetadata:
        """Rows as vLLM has them; layers compact what is due."""
        count = decode.thin_spans.size
        rows = Rows(
            tokens=slice(0, count),
            request=self._every_row[:count],
            seq_len=common.seq_lens[:count],
            thin_spans=torch.from_numpy(decode.thin_spans.astype(np.int32)),
        )
        due = due_spans(decode, slots)
        tensors = PassTensors(due, rows, [], repacking.repacks, repacking.repack_slots)
        if self.plan.config.evicts:
            stride = common.block_table_tensor.stride(0)
            tensors = skip_evicted(self.plan.rule, tensors, evicted, stride)
        return self.metadata(common, StepTensors([], None, None, None, None, [tensors]))


class _CacheBuilder(CPUAttentionMetadataBuilder):
    """VLLM's own, for dense blocks in the form that thin ones are made from."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # AMX and NEON packings are out.
        self.isa = dense_isa(self.dtype, self.head_dim, self.block_size)
        self._set_isa_to_layers(layer_names)
