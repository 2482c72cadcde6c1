"""What a step of statically pruned requests looks like on a GPU.

Nothing is sorted and nothing is sent: vLLM's own lengths and block table are used where they are,
so the metadata of a batch of single tokens may be captured in a full CUDA graph. It does not
matter there whether a token is the last one of a prompt: nothing ever happens after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from think_vllm.hooks.static_engine import selected_static
from think_vllm.metrics.worker import begin_report
from think_vllm.worker.cuda.warmup import warm_up_static_layers
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.static.channels import rank_channels


@dataclass(frozen=True)
class StaticCUDAMetadata:
    """One step, shared by all layers. A request's number is its row of the block table.

    Args:
        block_table: int32 [num_reqs, width]. Blocks of each request.
        query_start: int32 [num_reqs + 1]. Start of each request's queries.
        seq_len: int32 [num_reqs]. Tokens that the last query of each attends to, 0 for padding.
        single: Requests from the first one on that have one query each; query ``r`` is theirs.
        max_query_len: Most queries of a request behind those, 0 if none has any.
        max_context: Tokens of the longest context, at most.
    """

    block_table: torch.Tensor
    query_start: torch.Tensor
    seq_len: torch.Tensor
    single: int
    max_query_len: int
    max_context: int


class StaticCUDAMetadataBuilder(AttentionMetadataBuilder[StaticCUDAMetadata]):
    """Builds ``StaticCUDAMetadata``."""

    # As ``ThinkCUDAMetadataBuilder``. Batches with chunks could not be replayed: their launch
    # depends on the longest one. No GPU has captured or replayed either.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Single-token queries first: those of the decode kernel are the first rows.
        self._init_reorder_batch_threshold(1)
        engine = selected_static()
        # Another engine of this process may have left measurements, which are none of ours.
        begin_report()
        layers = vllm_config.compilation_config.static_forward_context
        impls = {name: layers[name].impl for name in layer_names}
        first = impls[layer_names[0]]
        heads = rank_heads(vllm_config, first.num_kv_heads, engine.plan.head_size)
        for name, impl in impls.items():
            impl.use(rank_channels(engine, heads.of_layer(name)), device)
        if device.type == "cuda":
            # Here, because vLLM builds this before it reports healthy.
            dtype = vllm_config.model_config.dtype
            warm_up_static_layers(engine.plan, impls.values(), dtype, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> StaticCUDAMetadata:
        """See which requests come first that have one query; all numbers are the host's."""
        common = common_attn_metadata
        num_queries = np.diff(common.query_start_loc_cpu.numpy())
        others = np.flatnonzero(num_queries != 1)
        single = int(others[0]) if others.size else num_queries.size
        return StaticCUDAMetadata(
            block_table=common.block_table_tensor,
            query_start=common.query_start_loc,
            seq_len=common.seq_lens,
            single=single,
            max_query_len=int(num_queries[single:].max(initial=0)),
            max_context=common.max_seq_len,
        )

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> StaticCUDAMetadata:
        """Rows of a graph of single-token queries; vLLM fills in which, when it replays it."""
        common = common_attn_metadata
        return StaticCUDAMetadata(
            block_table=common.block_table_tensor,
            query_start=common.query_start_loc,
            seq_len=common.seq_lens,
            single=common.num_reqs,
            max_query_len=0,
            max_context=common.max_seq_len,
        )
