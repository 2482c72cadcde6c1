"""Prepare one step on a GPU.

A batch of single tokens past their prompts may run as a full CUDA graph, which keeps addresses.
So its rows live in buffers of the builder, vLLM's own lengths and block table are used where
they are, and spans that are due are compacted here, ahead of the graph.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from csrc_triton.compact import compact_spans, compact_workspace
from think_vllm.worker.cuda.decode_batch import DecodeBatch
from think_vllm.worker.cuda.metadata import to_device, with_pages
from think_vllm.worker.cuda.warmup import warm_up_layers
from think_vllm.worker.metadata_builder import ThinkMetadata, ThinkMetadataBuilder
from think_vllm.worker.step import DecodePass, Int64Array
from think_vllm.worker.step_tensors import DueSpans, PassTensors, StepTensors
from think_vllm.worker.step_writer import StepSlots, due_spans


class ThinkCUDAMetadataBuilder(ThinkMetadataBuilder):
    """Builds ``ThinkMetadata`` on a GPU."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.workspace = compact_workspace(self.plan, device)
        self._addresses: tuple[int, ...] = ()
        self._layers = torch.zeros(len(layer_names), dtype=torch.int64, device=device)
        max_rows = vllm_config.scheduler_config.max_num_seqs
        self._batch = DecodeBatch(self.plan, max_rows, device)
        if device.type == "cuda":
            # Here, because vLLM builds this before it reports healthy.
            context = vllm_config.compilation_config.static_forward_context
            impls = [context[name].impl for name in layer_names]
            warm_up_layers(self.plan, impls, kv_cache_spec.dtype, device)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ThinkMetadata:
        """Rows of a graph of single-token queries; vLLM fills in which, when it replays it."""
        none = np.zeros(0, np.int64)
        return self._decode(common_attn_metadata, none, none)

    def forget_batch(self) -> None:
        """Let a graph that is replayed without requests read no block of the last batch's."""
        self._batch.forget()

    def prepare(self, common: CommonAttentionMetadata, tensors: StepTensors) -> ThinkMetadata:
        """Send a step that is no decode batch, and cut the block table to what it attends to."""
        metadata = self.metadata(common, to_device(tensors, self.device))
        tables = metadata.block_table, metadata.decode_table
        pages = with_pages(metadata.tensors, *tables, self.plan.block_size)
        return replace(metadata, tensors=pages)

    def build_decode(
        self,
        common: CommonAttentionMetadata,
        decode: DecodePass,
        repacking: PassTensors,
        slots: StepSlots,
        evicted: Int64Array,
    ) -> ThinkMetadata:
        """Repack prompts and compact spans ahead of the batch, which may be a graph."""
        self._repack(common.block_table_tensor, repacking)
        self._compact(common.block_table_tensor, due_spans(decode, slots))
        return self._decode(common, decode.thin_spans, evicted)

    def _decode(
        self, common: CommonAttentionMetadata, thin_spans: Int64Array, evicted: Int64Array
    ) -> ThinkMetadata:
        """One query per request, padding rows behind them."""
        stride = common.block_table_tensor.stride(0)
        rows = self._batch.rows(common.seq_lens[: common.num_reqs], thin_spans, evicted, stride)
        decode = PassTensors(None, rows, [])
        return self.metadata(common, StepTensors([], None, None, None, None, [decode]))

    def _repack(self, block_table: torch.Tensor, decode: PassTensors) -> None:
        """Repack what is kept of prompts in all layers, ahead of a graph."""
        if not decode.repacks:
            return
        context = self.vllm_config.compilation_config.static_forward_context
        for name, index in self.state.index.items():
            layer = context[name]
            layer.impl.attention.repack(layer.kv_cache, block_table, decode, self.state, index)

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
            workspace=self.workspace,
        )
