"""The attention backend on NVIDIA GPUs with ``--kv-select static``.

A step's keys and values are stored first, and then every query reads everything from the cache, its
own token included, whole prompts as well, so chunk boundaries do not change results.
vLLM's FlashAttention has no part in it.

Nothing is sorted and nothing is sent: vLLM's own lengths and block table are used where they are,
so the metadata of a batch of single tokens may be captured in a full CUDA graph. It does not
matter there whether a token is the last one of a prompt: nothing ever happens after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from csrc_triton.static_blocks import ChannelOrder, order_channels
from csrc_triton.static_context import static_context
from csrc_triton.static_decode import static_decode
from csrc_triton.static_store import store_static
from think_vllm.hooks.static_engine import WHO, remember_static
from think_vllm.hooks.static_spec import customize_static_spec
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.worker.cuda.backend import CustomCUDABackend
from think_vllm.worker.cuda.layer import CUDALayerImpl
from think_vllm.worker.cuda.warmup import warm_up_static_layers
from think_vllm.worker.device import Blocks, LayerCall
from think_vllm.worker.static.builder import StaticMetadata, StaticMetadataBuilder
from think_vllm.worker.static.layer import StaticKernels, StaticLayer
from think_vllm.worker.step_tensors import Chunks, Rows


class StaticCUDAKernels(StaticKernels):
    """Kernels of one layer on a GPU. Rows and chunks are neighbours in the batch, rows first."""

    def __init__(self, plan: StaticPlan, scale: float, logits_soft_cap: float) -> None:
        super().__init__(plan, scale, logits_soft_cap)
        self._order: ChannelOrder | None = None

    @property
    def order(self) -> ChannelOrder:
        """Of the layer's channels; see ``use``."""
        assert self._order is not None
        return self._order

    def use(self, channels: StaticChannels, device: torch.device) -> None:
        """Take the layer's channels."""
        self._order = order_channels(channels, self.plan.head_size, device)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """See ``store_static``."""
        store_static(key, value, kv_cache, slot_mapping, self.order, self.plan)

    def attend_chunks(
        self, call: LayerCall, table: torch.Tensor, chunks: Chunks, out: torch.Tensor
    ) -> None:
        """See ``static_context``; the first request that has a chunk is ``chunks.prepared``."""
        static_context(
            call.query[chunks.tokens],
            call.kv_cache,
            table,
            chunks.starts,
            chunks.seq_len,
            chunks.prepared,
            self.order,
            self.plan,
            self.scale,
            out,
            chunks.max_query_len,
            logits_soft_cap=self.logits_soft_cap,
        )

    def attend_rows(
        self, query: torch.Tensor, blocks: Blocks, rows: Rows, out: torch.Tensor, max_context: int
    ) -> None:
        """See ``static_decode``."""
        static_decode(
            query,
            *blocks,
            rows.seq_len,
            self.order,
            self.plan,
            self.scale,
            out,
            logits_soft_cap=self.logits_soft_cap,
            max_context=max_context,
        )


class StaticCUDAImpl(CUDALayerImpl[StaticMetadata]):
    """Attention over statically pruned blocks on a GPU, as vLLM calls it."""

    who = WHO
    attention: StaticLayer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        plan = remember_static(get_current_vllm_config()).plan
        self.attention = StaticLayer(StaticCUDAKernels(plan, self.scale, self.logits_soft_cap))

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


class StaticCUDAMetadataBuilder(StaticMetadataBuilder):
    """Builds ``StaticMetadata`` on a GPU."""

    # As ``ThinkCUDAMetadataBuilder``. Batches with chunks could not be replayed: their launch
    # depends on the longest one. No GPU has captured or replayed either.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        if device.type == "cuda":
            # Here, because vLLM builds this before it reports healthy.
            dtype = vllm_config.model_config.dtype
            warm_up_static_layers(self.plan, self.impls.values(), dtype, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StaticMetadata:
        """See which requests come first that have one query; all numbers are the host's."""
        num_queries = np.diff(common_attn_metadata.query_start_loc_cpu.numpy())
        others = np.flatnonzero(num_queries != 1)
        single = int(others[0]) if others.size else num_queries.size
        max_query_len = int(num_queries[single:].max(initial=0))
        return self._build(common_attn_metadata, single, max_query_len)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StaticMetadata:
        """Rows of a graph of single-token queries; vLLM fills in which, when it replays it."""
        return self._build(common_attn_metadata, common_attn_metadata.num_reqs, 0)

    def _build(
        self, common: CommonAttentionMetadata, single: int, max_query_len: int
    ) -> StaticMetadata:
        """So many requests of one query each, and chunks behind them if any has queries."""
        starts, seq_len = common.query_start_loc, common.seq_lens
        rows = chunks = None
        if single:
            # Query ``r`` is that of row ``r`` of the block table.
            rows = Rows(slice(0, single), starts[:single], seq_len[:single], None)
        if max_query_len:
            chunks = Chunks(
                fresh=False,
                tokens=slice(None),
                starts=starts,
                seq_len=seq_len,
                request=starts[:0],  # the kernel counts rows from ``prepared`` on
                thin_spans=None,
                max_query_len=max_query_len,
                max_seq_len=common.max_seq_len,
                prepared=single,
            )
        return StaticMetadata(common.block_table_tensor, chunks, rows, common.max_seq_len)


class StaticCUDABackend(CustomCUDABackend):
    """CUDA attention over statically pruned blocks."""

    @staticmethod
    def get_impl_cls() -> type[StaticCUDAImpl]:
        """Class that computes a layer's attention."""
        return StaticCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[StaticCUDAMetadataBuilder]:
        """Class that prepares a step."""
        return StaticCUDAMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Say how many channels are stored."""
        return customize_static_spec(spec)
