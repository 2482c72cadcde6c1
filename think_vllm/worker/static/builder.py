"""Prepare one step of statically pruned requests: nothing is sorted, kept or compacted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder

from think_vllm.hooks.static_engine import StaticEngine, selected_static
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.metrics.rank import begin_report
from think_vllm.worker.heads import rank_heads
from think_vllm.worker.policies import LayerHeads
from think_vllm.worker.step_tensors import Chunks, Rows


@dataclass(frozen=True)
class StaticMetadata:
    """One step, shared by all layers."""

    block_table: torch.Tensor  # int32 [num_reqs, width]. Blocks of each request
    chunks: Chunks | None  # queries of requests that have several; None for none
    rows: Rows | None  # all other queries, None for none
    max_context: int  # tokens of the longest context, at most


class StaticMetadataBuilder(AttentionMetadataBuilder[StaticMetadata]):
    """Builds ``StaticMetadata``; says to each layer which channels it keeps."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # Single-token queries first: those of prompts are then neighbours as a rule.
        self._init_reorder_batch_threshold(1)
        engine = selected_static()
        self.plan = engine.plan
        # Another engine of this process may have left measurements, which are none of ours.
        begin_report()
        layers = vllm_config.compilation_config.static_forward_context
        self.impls = {name: layers[name].impl for name in layer_names}
        heads = rank_heads(vllm_config, kv_cache_spec.num_kv_heads, self.plan.head_size)
        for name, impl in self.impls.items():
            # Its number is not known while a layer is built.
            impl.attention.kernels.use(rank_channels(engine, heads.of_layer(name)), device)


def rank_channels(engine: StaticEngine, heads: LayerHeads) -> StaticChannels:
    """Kept channels of the KV heads that this rank has of a layer."""
    these = slice(heads.first, heads.first + heads.count)
    return StaticChannels(
        keys=torch.tensor(engine.tables.kept_keys(heads.layer, engine.plan)[these]),
        values=torch.tensor(engine.tables.kept_values(heads.layer, engine.plan)[these]),
    )
