"""The attention backend on CPUs, registered as ``CUSTOM``.

Extends vLLM's CPU backend: its C++ kernels store dense blocks and serve prompt queries;
queries past the prompt run in ours.
"""

from typing import Any

from vllm.v1.attention.backend import AttentionType, MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from think_vllm.hooks.kv_cache_spec import customize_spec
from think_vllm.worker.cpu.builder import ThinkCPUMetadataBuilder
from think_vllm.worker.cpu.impl import ThinkCPUImpl


class CustomCPUBackend(CPUAttentionBackend):
    """What our backends on CPUs have in common."""

    supported_kv_cache_dtypes = ("auto", "float16", "bfloat16")

    @staticmethod
    def get_name() -> str:
        """Name in vLLM's backend registry."""
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Block sizes of vLLM's ``vec16`` kernels, and of ours, which read whole vectors."""
        return [MultipleOf(16)]

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return bool(attn_type == AttentionType.DECODER)


class ThinkCPUBackend(CustomCPUBackend):
    """CPU attention over thin and dense blocks."""

    @staticmethod
    def get_impl_cls() -> type[ThinkCPUImpl]:
        """Class that computes a layer's attention."""
        return ThinkCPUImpl

    @staticmethod
    def get_builder_cls() -> type[ThinkCPUMetadataBuilder]:
        """Class that prepares a step."""
        return ThinkCPUMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Give full-attention layers the spec whose manager frees compacted spans."""
        return customize_spec(spec)
