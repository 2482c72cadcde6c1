"""A layer on the CPU as vLLM calls it, whatever its blocks hold."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from think_vllm.worker.device import LayerCall
from think_vllm.worker.layer import AttentionLayer
from think_vllm.worker.layer_support import reject_options


class CPULayerImpl(CPUAttentionBackendImpl):
    """Rejects what our kernels on CPUs do not have, and leaves the rest to ``attention``.

    Class attribute ``who`` names in errors what rejects. Subclasses set ``attention``, which may
    use ``prompt_attention``, vLLM's own ``forward``.
    """

    who: str
    attention: AttentionLayer[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        reject_options(
            self.who,
            (
                (self.alibi_slopes, "ALiBi position biases"),
                (self.kv_sharing_target_layer_name, "a KV cache shared between layers"),
            ),
        )
        self.prompt_attention = super().forward

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
        """Attend: see ``AttentionLayer.run``. Without metadata, vLLM profiles."""
        self.attention.name(layer.layer_name)
        if attn_metadata is not None:
            call = LayerCall(layer, query, key, value, kv_cache, output)
            self.attention.run(call, attn_metadata)
        return output
