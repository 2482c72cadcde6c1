"""The attention backend on NVIDIA GPUs, registered as ``CUSTOM``.

Dense blocks have the form of vLLM's FlashAttention backend, whose kernel serves all prompt queries
that see no thin block. What stores, compacts and decodes is ours (``csrc_triton/``).
"""

from typing import Any

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from think_vllm.hooks.engine_support import CUDA_CAPABILITY, CUDA_MIN_HEAD_SIZE
from think_vllm.hooks.kv_cache_spec import customize_spec
from think_vllm.plan.layout import MAX_HEAD_SIZE
from think_vllm.plan.planner import SIZE_MULTIPLE
from think_vllm.worker.cuda.builder import ThinkCUDAMetadataBuilder
from think_vllm.worker.cuda.impl import ThinkCUDAImpl
from think_vllm.worker.cuda.layer import PLAIN_DTYPES


class CustomCUDABackend(AttentionBackend):
    """What our backends on NVIDIA GPUs have in common."""

    # Keys and values are stored by an operator of its own, ``do_kv_cache_update``.
    forward_includes_kv_cache_update = False
    supported_dtypes = (torch.float16, torch.bfloat16)
    supported_kv_cache_dtypes = PLAIN_DTYPES

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's backend registry."""
        return "CUSTOM"

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major blocks: one (block, KV head) is one run of bytes."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Block sizes of the planner."""
        return [MultipleOf(SIZE_MULTIPLE)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes of the kernels."""
        return list(range(CUDA_MIN_HEAD_SIZE, MAX_HEAD_SIZE + 1, SIZE_MULTIPLE))

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and later."""
        return bool(capability.to_int() >= CUDA_CAPABILITY)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No other backend can read a thin block."""
        return False

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return bool(attn_type == AttentionType.DECODER)


class ThinkCUDABackend(CustomCUDABackend):
    """CUDA attention over thin and dense blocks."""

    @staticmethod
    def get_impl_cls() -> type[ThinkCUDAImpl]:
        """Class that computes a layer's attention."""
        return ThinkCUDAImpl

    @staticmethod
    def get_builder_cls() -> type[ThinkCUDAMetadataBuilder]:
        """Class that prepares a step."""
        return ThinkCUDAMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give full-attention layers the spec whose manager frees compacted spans."""
        return customize_spec(spec)
