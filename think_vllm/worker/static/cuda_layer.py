"""The attention backend on NVIDIA GPUs with ``--kv-select static``: backend, a layer's attention.

Blocks are vLLM's in every respect but their bytes, as on CPUs (``cpu_static.py``). A step's keys
and values are stored first, and then every query reads everything from the cache, its own token
included, whole prompts as well: one form of what is seen, however a prompt is cut. vLLM's
FlashAttention has no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config

from csrc_triton.static_blocks import ChannelOrder, order_channels
from csrc_triton.static_context import static_context
from csrc_triton.static_decode import static_decode
from csrc_triton.static_store import store_static
from think_vllm.hooks.static_engine import WHO, remember_static
from think_vllm.hooks.static_spec import customize_static_spec
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.worker.cuda.backend import CustomCUDABackend
from think_vllm.worker.cuda.layer import CUDALayerImpl, refuse_output_scales
from think_vllm.worker.static.cuda_builder import StaticCUDAMetadata, StaticCUDAMetadataBuilder


class StaticCUDAImpl(CUDALayerImpl[StaticCUDAMetadata]):
    """Attention over statically pruned blocks."""

    who = WHO

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        self.plan = remember_static(get_current_vllm_config()).plan
        self.order: ChannelOrder | None = None

    def use(self, channels: StaticChannels, device: torch.device) -> None:
        """Take the layer's channels; its number is not known while it is built."""
        self.order = order_channels(channels, self.plan.head_size, device)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the kept channels of a step's tokens; see ``store_static``."""
        assert self.order is not None
        store_static(key, value, kv_cache, slot_mapping, self.order, self.plan)

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
            key: [num_tokens, Hk, D]. Stored before this call, and not looked at.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: See ``store_static``.
            attn_metadata: Of this step; None while vLLM profiles.
            output: [num_tokens, Hq, D]. Written for every query of the step.
            output_scale: Not supported.
            output_block_scale: Not supported.

        Returns:
            ``output``.
        """
        refuse_output_scales(output_scale, output_block_scale)
        if attn_metadata is None:
            return output.fill_(0)
        assert self.order is not None
        step: StaticCUDAMetadata = attn_metadata
        blocks = (kv_cache, step.block_table)
        if step.single:
            static_decode(
                query[: step.single],
                *blocks,
                step.seq_len[: step.single],
                self.order,
                self.plan,
                self.scale,
                output[: step.single],
                logits_soft_cap=self.logits_soft_cap,
                max_context=step.max_context,
            )
        if step.max_query_len:
            static_context(
                query,
                *blocks,
                step.query_start,
                step.seq_len,
                step.single,
                self.order,
                self.plan,
                self.scale,
                output,
                step.max_query_len,
                logits_soft_cap=self.logits_soft_cap,
            )
        return output


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
