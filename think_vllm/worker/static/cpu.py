"""The attention backend on CPUs with ``--kv-select static``.

Prompts that start in a step attend in scratch blocks, as they will be read from the cache, pruned
channels being zero: vLLM's kernel is fast on them. All other queries read the cache, each by
itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata

from think_vllm.hooks.static_engine import WHO, remember_static
from think_vllm.hooks.static_spec import customize_static_spec
from think_vllm.kernels.cpu.static_attention import static_attention
from think_vllm.kernels.cpu.static_store import read_back, store_static
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.worker.cpu.backend import CustomCPUBackend
from think_vllm.worker.cpu.kernels import PromptAttention
from think_vllm.worker.cpu.layer import CPULayerImpl
from think_vllm.worker.cpu.prompts import ScratchBuilder, each_query
from think_vllm.worker.device import Blocks, LayerCall
from think_vllm.worker.static.builder import StaticMetadata, StaticMetadataBuilder
from think_vllm.worker.static.layer import StaticKernels, StaticLayer
from think_vllm.worker.step import Prefill
from think_vllm.worker.step_tensors import Chunks, Rows
from think_vllm.worker.step_writer import write_chunks


class StaticCPUKernels(StaticKernels):
    """Kernels of one layer on the CPU: numba's, and vLLM's C++ for prompts."""

    def __init__(
        self,
        plan: StaticPlan,
        scale: float,
        logits_soft_cap: float,
        sinks: torch.Tensor | None,
        prompt_attention: PromptAttention,
    ) -> None:
        super().__init__(plan, scale, logits_soft_cap, sinks)
        self._prompt_attention = prompt_attention
        self._channels: StaticChannels | None = None

    @property
    def channels(self) -> StaticChannels:
        """Of the layer; see ``use``."""
        assert self._channels is not None
        return self._channels

    def use(self, channels: StaticChannels, device: torch.device) -> None:
        """Take the layer's channels."""
        self._channels = channels

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See ``store_static``."""
        store_static(key, value, kv_cache, slot_mapping, self.channels, self.plan)

    def attend_chunks(
        self, call: LayerCall, table: torch.Tensor, chunks: Chunks, out: torch.Tensor
    ) -> None:
        """Attend to what the step has stored, in scratch blocks."""
        query = call.query[chunks.tokens]
        keys = read_back(call.key[chunks.tokens], self.channels.keys, self.plan)
        values = read_back(call.value[chunks.tokens], self.channels.values, self.plan)
        scratch = chunks.prepared.scratch
        scratch.store(keys, values)
        # vLLM's kernel takes its form of blocks from the metadata.
        metadata = chunks.prepared.metadata
        self._prompt_attention(call.layer, query, keys, values, scratch.blocks, metadata, out)

    def attend_rows(
        self, query: torch.Tensor, blocks: Blocks, rows: Rows, out: torch.Tensor, max_context: int
    ) -> None:
        """See ``static_attention``."""
        static_attention(
            query,
            *blocks,
            rows.request.numpy(),
            rows.seq_len.numpy(),
            self.channels,
            self.plan,
            self.scale,
            out,
            logits_soft_cap=self.logits_soft_cap,
            sinks=self.sinks,
        )


class StaticCPUImpl(CPULayerImpl):
    """Attention over statically pruned blocks on the CPU, as vLLM calls it."""

    who = WHO
    attention: StaticLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        plan = remember_static(get_current_vllm_config()).plan
        cap = self.logits_soft_cap or 0.0
        kernels = StaticCPUKernels(plan, self.scale, cap, self.sinks, self.prompt_attention)
        self.attention = StaticLayer(kernels)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the kept channels of a step's tokens: see ``StaticKernels.store``."""
        self.attention.kernels.store(key, value, kv_cache, slot_mapping)


class StaticCPUMetadataBuilder(StaticMetadataBuilder):
    """Builds ``StaticMetadata`` on the CPU."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._dtype = vllm_config.model_config.dtype
        whole = replace(
            kv_cache_spec,
            head_size=self.plan.head_size,
            head_size_v=self.plan.head_size,
            dtype=self._dtype,
            state_content_bytes=None,
        )
        self._scratch = ScratchBuilder(whole, layer_names, vllm_config, device)
        # Here, because vLLM builds this before it reports healthy: nothing compiles later.
        self._warm_up(self.impls[layer_names[0]])

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StaticMetadata:
        """Sort the batch: prompts that start in the step, and queries that read the cache."""
        common = common_attn_metadata
        query_start = common.query_start_loc_cpu.numpy().astype(np.int64)
        seq_lens = common.seq_lens.numpy().astype(np.int64)
        num_tokens = np.diff(query_start)
        is_fresh = num_tokens == seq_lens
        # Requests without a query may pad a batch.
        used = num_tokens > 0
        step = Prefill(
            request=np.arange(seq_lens.size),
            first_token=query_start[:-1],
            num_tokens=num_tokens,
            seq_len=seq_lens,
            thin_spans=np.zeros_like(seq_lens),
        )
        chunks = None
        if (is_fresh & used).any():
            chunks = write_chunks(step.select(is_fresh & used), fresh=True)
            chunks = replace(chunks, prepared=self._scratch.build(common, chunks))
        rows = None
        if (~is_fresh & used).any():
            rows = each_query(write_chunks(step.select(~is_fresh & used), fresh=False))
        return StaticMetadata(common.block_table_tensor, chunks, rows, common.max_seq_len)

    def _warm_up(self, impl: StaticCPUImpl) -> None:
        """Compile the kernel, or load it from numba's cache."""
        plan, heads = self.plan, impl.num_kv_heads
        stored = torch.uint8 if plan.is_quantized else self._dtype
        width = plan.layout.token_bytes // stored.itemsize
        kv_cache = torch.zeros(1, heads, plan.block_size, width, dtype=stored)
        query = torch.zeros(1, impl.num_heads, plan.head_size, dtype=self._dtype)
        one = torch.ones(1, dtype=torch.int32)
        rows = Rows(slice(0, 1), torch.zeros_like(one), one, None)
        table = torch.zeros(1, 1, dtype=torch.int32)
        kernels = impl.attention.kernels
        kernels.attend_rows(query, Blocks(kv_cache, table), rows, torch.empty_like(query), 1)


class StaticCPUBackend(CustomCPUBackend):
    """CPU attention over statically pruned blocks."""

    @staticmethod
    def get_impl_cls() -> type[StaticCPUImpl]:
        """Class that computes a layer's attention."""
        return StaticCPUImpl

    @staticmethod
    def get_builder_cls() -> type[StaticCPUMetadataBuilder]:
        """Class that prepares a step."""
        return StaticCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Say how many channels are stored."""
        return customize_static_spec(spec)
