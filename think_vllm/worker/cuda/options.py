"""What a layer on a GPU may ask for, whatever its blocks hold."""

from __future__ import annotations

from typing import Any, TypeVar

from vllm.v1.attention.backend import AttentionImpl

from think_vllm.worker.refusals import refuse_options

#: Values of ``--kv-cache-dtype`` that leave keys and values as computed.
PLAIN_DTYPES = ("auto", "bfloat16", "float16")

T = TypeVar("T")


class CUDALayerImpl(AttentionImpl[T]):
    """Refuses what our kernels on GPUs do not have, and keeps the rest of what a layer is.

    Class attribute ``who`` names in errors what refuses.
    """

    who: str

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
        refuse_options(
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


def refuse_output_scales(*scales: Any) -> None:
    """Refuse to quantize what attention puts out.

    Raises:
        NotImplementedError: If any scale is given.
    """
    if any(scale is not None for scale in scales):
        raise NotImplementedError("think-vllm: outputs of attention cannot be quantized")
