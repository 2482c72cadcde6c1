"""One layer's attention on the CPU, as vLLM calls it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from think_vllm.hooks.engine import remember_plan
from think_vllm.worker.builder import ThinkMetadata
from think_vllm.worker.cpu.kernels import CPUKernels
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.layer import ThinkLayer
from think_vllm.worker.refusals import refuse_options


class ThinkCPUImpl(CPUAttentionBackendImpl):
    """Attention over thin and dense blocks on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_options(
            "thin KV blocks",
            (
                (self.alibi_slopes, "ALiBi position biases"),
                (self.kv_sharing_target_layer_name, "a KV cache shared between layers"),
            ),
        )
        # vLLM builds layers with their engine's config at hand, and asks for specs without it.
        config = get_current_vllm_config()
        plan = remember_plan(config)
        heads = rank_heads(config, self.num_kv_heads, self.head_size)
        cap = self.logits_soft_cap or 0.0
        kernels = CPUKernels(plan, self.scale, cap, self.sinks, super().forward)
        self.thin = ThinkLayer(plan, heads, kernels)

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
        """Attend, and compact what has become old: see ``ThinkLayer.run``.

        Args:
            layer: vLLM's attention layer.
            query: [num_tokens, Hq, D].
            key: [num_tokens, Hk, D]. Stored densely before this call.
            value: [num_tokens, Hk, D]. As ``key``.
            kv_cache: [num_blocks, Hk, N, 2 * D]. Compacted in place.
            attn_metadata: Of this step; None while vLLM profiles.
            output: [num_tokens, Hq, D]. Written for every query of the step.
            output_scale: Not supported by CPU attention.
            output_block_scale: Not supported by CPU attention.

        Returns:
            ``output``.
        """
        self.thin.name(layer.layer_name)
        if isinstance(attn_metadata, ThinkMetadata):
            self.thin.run(layer, query, key, value, kv_cache, attn_metadata, output)
        return output
