"""The attention backend on CPUs with ``--kv-select static``: backend and one layer's attention.

Blocks are vLLM's in every respect but their bytes: its own block manager, prefix cache and
scheduler work on them as on dense ones. Prompts that start in a step attend in scratch blocks,
as they will be read from the cache, pruned channels being zero: vLLM's kernel is fast on them. All
other queries read the cache, each by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from think_vllm.hooks.static_engine import WHO, remember_static
from think_vllm.hooks.static_spec import customize_static_spec
from think_vllm.kernels.cpu.static_attention import static_attention
from think_vllm.kernels.cpu.static_store import read_back, store_static
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.worker.cpu.backend import CustomCPUBackend
from think_vllm.worker.refusals import refuse_options
from think_vllm.worker.static.cpu_builder import StaticCPUMetadata, StaticCPUMetadataBuilder
from think_vllm.worker.tokens import put_back


class StaticCPUImpl(CPUAttentionBackendImpl):
    """Attention over statically pruned blocks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_options(
            WHO,
            (
                (self.alibi_slopes, "ALiBi position biases"),
                (self.kv_sharing_target_layer_name, "a KV cache shared between layers"),
            ),
        )
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        self.plan = remember_static(get_current_vllm_config()).plan
        self.channels: StaticChannels | None = None

    def use(self, channels: StaticChannels) -> None:
        """Take the layer's channels; its number is not known while it is built."""
        self.channels = channels

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the kept channels of a step's tokens; see ``store_static``."""
        assert self.channels is not None
        store_static(key, value, kv_cache, slot_mapping, self.channels, self.plan)

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
        """Attend. Every query sees pruned keys and values alone, its own among them.

        Args:
            layer: vLLM's attention layer.
            query: [num_tokens, Hq, D].
            key: [num_tokens, Hk, D]. Stored before this call.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: See ``store_static``.
            attn_metadata: Of this step; None while vLLM profiles.
            output: [num_tokens, Hq, D]. Written for every query of the step.
            output_scale: Not supported by CPU attention.
            output_block_scale: Not supported by CPU attention.

        Returns:
            ``output``.
        """
        if not isinstance(attn_metadata, StaticCPUMetadata):
            return output
        assert self.channels is not None
        fresh = attn_metadata.fresh
        if fresh is not None:
            where = fresh.tokens
            keys = read_back(key[where], self.channels.keys, self.plan)
            values = read_back(value[where], self.channels.values, self.plan)
            fresh.scratch.store(keys, values)
            answer = output[where]
            # vLLM's kernel takes its form of blocks from the metadata.
            super().forward(
                layer, query[where], keys, values, fresh.scratch.blocks, fresh.metadata, answer
            )
            put_back(output, where, answer)
        rows = attn_metadata.rows
        if rows is not None:
            part = output[rows.tokens]
            static_attention(
                query[rows.tokens],
                kv_cache,
                attn_metadata.block_table,
                rows.request,
                rows.seq_len,
                self.channels,
                self.plan,
                self.scale,
                part,
                logits_soft_cap=self.logits_soft_cap,
                sinks=self.sinks,
            )
            put_back(output, rows.tokens, part)
        return output


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
