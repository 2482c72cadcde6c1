"""A step's batch in one layer of a CUDA backend."""

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata


def run_layer(
    layer: Any, index: int, batch: list[Any], counts: list[int], block_size: int,
    common: CommonAttentionMetadata, metadata: Any,
) -> torch.Tensor:  # fmt: skip
    """Store so many tokens of each request, and attend with them: [tokens, Hq, D].

    Requests have ``computed`` tokens, ``blocks``, and ``query``, ``key`` and ``value`` of each
    layer. Padding is NaN.
    """
    padding, device = common.num_actual_tokens - sum(counts), layer.kv_cache.device
    slots = [
        request.blocks[p // block_size] * block_size + p % block_size
        for request, count in zip(batch, counts, strict=True)
        for p in range(request.computed, request.computed + count)
    ]
    slot_mapping = torch.tensor(slots + [-1] * padding, device=device)

    def gather(name: str) -> torch.Tensor:
        parts = [
            getattr(request, name)[index, request.computed : request.computed + count]
            for request, count in zip(batch, counts, strict=True)
        ]
        rest = torch.full((padding, *parts[0].shape[1:]), torch.nan)
        return torch.cat([*parts, rest]).to(device)

    query, key, value = gather("query"), gather("key"), gather("value")
    out = torch.full_like(query, torch.nan)
    layer.impl.do_kv_cache_update(layer, key, value, layer.kv_cache, slot_mapping)
    layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, out)
    assert torch.isfinite(out[: sum(counts)]).all()
    return out[: sum(counts)].cpu()
