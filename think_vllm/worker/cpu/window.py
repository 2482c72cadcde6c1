"""Attention layers with a sliding window, beside full ones: vLLM's own, on blocks that were thin.

A window holds few tokens, so there is little to compact; spec, block manager, metadata and
kernels stay vLLM's. But all groups of layers share one block pool, and vLLM's kernels multiply
unused tokens by 0, and 0 * NaN is NaN. Bytes of a block that was thin may read as NaN, so a block
is cleared before its first token is stored.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from think_vllm.errors import REMEDY, ThinkError
from think_vllm.hooks.engine import remember_plan


class WindowCPUImpl(CPUAttentionBackendImpl):
    """vLLM's attention, in blocks that hold nothing of requests that had them before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        full_heads = config.model_config.get_num_kv_heads(config.parallel_config)
        full_size = remember_plan(config).head_size
        # Bytes of a block are the same for all layers, so vLLM would give the full ones blocks of
        # another size than the planned one.
        if (self.num_kv_heads, self.head_size) != (full_heads, full_size):
            raise ThinkError(
                f"thin KV blocks: a sliding-window layer has {self.num_kv_heads} KV heads of size "
                f"{self.head_size}, a full one {full_heads} of size {full_size}; models whose "
                f"heads differ are not supported. {REMEDY}"
            )

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store new keys and values; see vLLM's method.

        Args:
            layer: vLLM's attention layer.
            key: [num_tokens, Hk, D].
            value: [num_tokens, Hk, D].
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            slot_mapping: int64 [num_tokens]. Negative for padding.
        """
        clear_begun_blocks(kv_cache, slot_mapping)
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)


class WindowCPUBackend(CPUAttentionBackend):
    """vLLM's CPU attention for the sliding-window layers of a model with thin blocks."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """As thin blocks, so that all layers have blocks of one size."""
        return [MultipleOf(16)]

    @staticmethod
    def get_impl_cls() -> type[WindowCPUImpl]:
        """Class that computes a layer's attention."""
        return WindowCPUImpl


def clear_begun_blocks(kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Zero the blocks whose first slot is about to be written, and not the last one too.

    A request fills its blocks in order, so nothing in such a block is its own yet.

    Args:
        kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
        slot_mapping: int64 [num_tokens]. Negative for padding.
    """
    slots = slot_mapping.numpy()
    block_size = kv_cache.shape[2]
    begun = set((slots[slots % block_size == 0] // block_size).tolist())
    if not begun:
        return
    ended = slots[slots % block_size == block_size - 1]
    begun.difference_update((ended // block_size).tolist())
    for block in begun:
        kv_cache[block] = 0
