"""A layer on a GPU as vLLM calls it, whatever its blocks hold."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from vllm.v1.attention.backend import AttentionImpl

from think_vllm.worker.device import LayerCall
from think_vllm.worker.layer import AttentionLayer
from think_vllm.worker.layer_support import reject_options

#: Values of ``--kv-cache-dtype`` that leave keys and values as computed.
PLAIN_DTYPES = ("auto", "bfloat16", "float16")

T = TypeVar("T")


class CUDALayerImpl(AttentionImpl[T]):
    """Rejects what our kernels on GPUs do not have, and leaves the rest to ``attention``.

    Class attribute ``who`` names in errors what rejects. Subclasses set ``attention``.
    """

    who: str
    attention: AttentionLayer[Any]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        others = {name: value for name, value in others.items() if value is not None}
        reject_options(
            self.who,
            (
                (alibi_slopes, "ALiBi position biases"),
                (sliding_window, "a sliding window"),
                (others.pop("sinks", None), "attention sinks"),
                (kv_sharing_target_layer_name, "a KV cache shared between layers"),
                (None if attn_type == "decoder" else attn_type, f"attention of type {attn_type}"),
                (others or None, f"options that are unknown here: {', '.join(others)}"),
                (
                    None if kv_cache_dtype in PLAIN_DTYPES else kv_cache_dtype,
                    f"a KV cache of dtype {kv_cache_dtype}, perhaps its checkpoint's",
                ),
            ),
        )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)

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
        """Attend: see ``AttentionLayer.run``. Without metadata, vLLM profiles.

        Raises:
            NotImplementedError: If the output is to be quantized.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("think-vllm: outputs of attention cannot be quantized")
        self.attention.name(layer.layer_name)
        if attn_metadata is None:
            return output.fill_(0)
        call = LayerCall(layer, query, key, value, kv_cache, output)
        self.attention.run(call, attn_metadata)
        return output
