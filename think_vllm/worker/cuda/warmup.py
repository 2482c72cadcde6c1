"""Compile the kernels of an engine before it serves."""

from collections.abc import Iterable
from typing import Any

import torch

from csrc_triton.compact import compact_spans
from csrc_triton.context import context_attention
from csrc_triton.decode import decode_attention
from csrc_triton.scores import add_query_energy, key_energy
from csrc_triton.static_blocks import ChannelOrder
from csrc_triton.static_context import static_context
from csrc_triton.static_decode import static_decode
from csrc_triton.static_store import store_static
from csrc_triton.store import clear_tails, store_dense
from think_vllm.plan.planner import BlockPlan
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.worker.channel_selection import top_channels


def warm_up_layers(
    plan: BlockPlan, impls: Iterable[Any], dtype: torch.dtype, device: torch.device
) -> None:
    """``warm_up`` for each kind of layer: layers of a model may differ in heads and soft cap.

    Args:
        plan: How blocks are laid out.
        impls: Of the layers, each with ``num_heads``, ``num_kv_heads`` and ``logits_soft_cap``.
        dtype: Of the cache.
        device: The GPU.
    """
    kinds = {((x.num_heads, x.num_kv_heads), x.logits_soft_cap) for x in impls}
    for heads, cap in sorted(kinds):
        warm_up(plan, heads, dtype, device, cap)


def warm_up(
    plan: BlockPlan,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    logits_soft_cap: float = 0.0,
) -> None:
    """Run every kernel once on a few blocks: none is compiled later (``csrc_triton/launch.py``).

    Args:
        plan: How blocks are laid out.
        heads: ``Hq`` and ``Hk``.
        dtype: Of the cache.
        device: The GPU.
        logits_soft_cap: Of the layers; attention with one is another kernel.
    """
    cap = logits_soft_cap
    shape = (plan.span_blocks, heads[1], plan.block_size, 2 * plan.head_size)
    kv_cache = torch.zeros(shape, dtype=dtype, device=device)
    table = torch.arange(plan.span_blocks, dtype=torch.int32, device=device)[None]
    request = torch.zeros(1, dtype=torch.int32, device=device)
    none, one = torch.zeros_like(request), torch.ones_like(request)
    query = torch.zeros(1, heads[0], plan.head_size, dtype=dtype, device=device)
    key = torch.zeros(1, heads[1], plan.head_size, dtype=dtype, device=device)
    out = torch.empty_like(query)

    store_dense(key, key, kv_cache, request.long() * plan.span_tokens, plan)
    clear_tails(kv_cache, table, one, plan)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    scale = plan.head_size**-0.5
    for thin in (None, none):
        context_attention(
            query, kv_cache, table, starts, one, request, plan, scale, out, 1, cap, thin
        )
    channels = None
    if plan.prunes:
        size = (1, heads[1], plan.head_size)
        energy = torch.zeros(size, dtype=torch.float32, device=device)
        add_query_energy(query, request, request + 1, energy)
        channels = torch.arange(plan.head_size, dtype=torch.uint8, device=device)
        channels = channels.repeat(1, heads[1], 1)
        if plan.prunes_keys:
            keys = key_energy(kv_cache, table, request, one, plan, max_tokens=1)
            channels = top_channels(energy * keys, plan.key_channels)
        if plan.prunes_values:
            channels = torch.cat([channels, top_channels(energy, plan.value_channels)], dim=2)
    compact_spans(kv_cache, table, request, none, channels, plan)
    layers = torch.tensor([kv_cache.data_ptr()], dtype=torch.int64, device=device)
    layered = None if channels is None else channels[None]
    compact_spans(kv_cache, table, request, none, layered, plan, layers=layers)
    decode_attention(query, kv_cache, table, request, one, none, plan, scale, out, cap)


def warm_up_static_layers(
    plan: StaticPlan, impls: Iterable[Any], dtype: torch.dtype, device: torch.device
) -> None:
    """``warm_up_static`` for each kind of layer; ``impls`` as of ``warm_up_layers``.

    Args:
        plan: How blocks are laid out.
        impls: Of the layers.
        dtype: Of the model.
        device: The GPU.
    """
    kinds = {
        ((x.num_heads, x.num_kv_heads), x.logits_soft_cap): x.attention.kernels.order for x in impls
    }
    for (heads, cap), order in kinds.items():
        warm_up_static(plan, order, heads, dtype, device, cap)


def warm_up_static(
    plan: StaticPlan,
    order: ChannelOrder,
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    logits_soft_cap: float = 0.0,
) -> None:
    """Run every kernel over static blocks once, as ``warm_up`` does.

    Args:
        plan: How blocks are laid out.
        order: Of a layer.
        heads: ``Hq`` and ``Hk``.
        dtype: Of the model.
        device: The GPU.
        logits_soft_cap: Of the layers; attention with one is another kernel.
    """
    stored = torch.uint8 if plan.is_quantized else dtype
    width = plan.layout.token_bytes // stored.itemsize
    kv_cache = torch.zeros(1, heads[1], plan.block_size, width, dtype=stored, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    query = torch.zeros(1, heads[0], plan.head_size, dtype=dtype, device=device)
    key = torch.zeros(1, heads[1], plan.head_size, dtype=dtype, device=device)
    slots = torch.zeros(1, dtype=torch.int64, device=device)
    store_static(key, key, kv_cache, slots, order, plan)
    one = torch.ones(1, dtype=torch.int32, device=device)
    starts = torch.arange(2, dtype=torch.int32, device=device)
    out, scale = torch.empty_like(query), plan.head_size**-0.5
    cap = logits_soft_cap
    static_decode(query, kv_cache, table, one, order, plan, scale, out, cap)
    static_context(query, kv_cache, table, starts, one, 0, order, plan, scale, out, 1, cap)
