"""Compile every kernel before serving starts, or load it from numba's cache on disk."""

import numpy as np
import torch

from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.cpu.decode import DecodeRows, decode_attention
from think_vllm.kernels.cpu.scoring import add_query_energy, key_energy
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.channel_selection import top_channels


def warm_up(dtype: torch.dtype, num_heads: int, num_kv_heads: int, plan: BlockPlan) -> None:
    """Run every kernel once on a tiny cache, so that none compiles while serving.

    numba keeps what it compiled beside this package, or in the user's cache directory if the
    package is read-only; ``NUMBA_CACHE_DIR`` overrides both.

    Args:
        dtype: Of the cache and the queries.
        num_heads: Query heads, of this worker.
        num_kv_heads: KV heads, of this worker.
        plan: How blocks are laid out.
    """
    num_blocks = plan.span_blocks + 1
    kv_cache = torch.zeros(
        num_blocks, num_kv_heads, plan.block_size, 2 * plan.head_size, dtype=dtype
    )
    block_table = torch.arange(num_blocks, dtype=torch.int32).view(1, num_blocks)
    request = np.zeros(1, np.int32)
    lengths = np.full(1, plan.span_tokens + 1, np.int32)
    query = torch.zeros(1, num_heads, plan.head_size, dtype=dtype)

    channels = torch.arange(plan.head_size, dtype=torch.uint8).repeat(1, num_kv_heads, 1)
    if plan.prunes:
        query_energy = torch.zeros(num_kv_heads, plan.head_size, dtype=torch.float32)
        add_query_energy(query, 0, 1, query_energy)
    if plan.prunes_keys:
        energy = key_energy(kv_cache, block_table, request, lengths, plan)
        channels = top_channels(query_energy * energy, plan.key_channels)
    if plan.prunes_values:
        values = top_channels(query_energy.unsqueeze(0), plan.value_channels)
        channels = torch.cat([channels, values], dim=2)
    compact_spans(kv_cache, block_table, request, request, channels, plan)
    rows = DecodeRows(request=request, seq_len=lengths, thin_spans=np.ones(1, np.int32))
    decode_attention(
        query, kv_cache, block_table, rows, plan, scale=1.0, out=torch.empty_like(query)
    )
