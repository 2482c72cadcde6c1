"""One layer's attention on a GPU, as vLLM calls it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config

from csrc_triton.store import store_dense
from think_vllm.hooks.engine import remember_plan
from think_vllm.worker.cuda.kernels import CUDAKernels
from think_vllm.worker.cuda.layer import CUDALayerImpl
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.layer import ThinkLayer
from think_vllm.worker.metadata_builder import ThinkMetadata


class ThinkCUDAImpl(CUDALayerImpl[ThinkMetadata]):
    """Attention over thin and dense blocks on a GPU."""

    who = "thin KV blocks"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        config = get_current_vllm_config()
        plan = remember_plan(config)
        heads = rank_heads(config, self.num_kv_heads, self.head_size)
        kernels = CUDAKernels(plan, self.scale, self.logits_soft_cap)
        self.plan = plan
        self.attention: ThinkLayer = ThinkLayer(plan, heads, kernels)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store new keys and values densely.

        Args:
            layer: vLLM's attention layer.
            key: [num_tokens, Hk, D], perhaps with padding behind.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            slot_mapping: int64 [num_tokens]. Negative for padding.
        """
        count = slot_mapping.shape[0]
        store_dense(key[:count], value[:count], kv_cache, slot_mapping, self.plan)
