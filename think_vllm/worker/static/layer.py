"""One layer's attention over statically pruned blocks, the same on all devices.

Blocks are vLLM's in every respect but their bytes: its own block manager, prefix cache and
scheduler work on them as on dense ones. Every query sees pruned keys and values alone, its own
among them.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.worker.device import AttentionKernels, LayerCall
from think_vllm.worker.layer import AttentionLayer
from think_vllm.worker.static.builder import StaticMetadata


class StaticKernels(AttentionKernels):
    """Kernels of one layer over statically pruned blocks.

    Args:
        plan: How blocks are laid out.
        scale: See ``AttentionKernels``, as for the others.
        logits_soft_cap: Of the layer's scores.
        sinks: Of the layer.
    """

    def __init__(
        self,
        plan: StaticPlan,
        scale: float,
        logits_soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        super().__init__(scale, logits_soft_cap, sinks)
        self.plan = plan

    @abstractmethod
    def use(self, channels: StaticChannels, device: torch.device) -> None:
        """Take the layer's channels."""

    @abstractmethod
    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Store the kept channels of a step's tokens.

        Args:
            key: [num_tokens, Hk, D].
            value: [num_tokens, Hk, D].
            kv_cache: [num_blocks, Hk, N, bytes of a token]. Written.
            slot_mapping: int64 [num_tokens]. Negative for padding.
        """


class StaticLayer(AttentionLayer[StaticKernels]):
    """What a step does in one layer."""

    def run(self, call: LayerCall, metadata: StaticMetadata) -> None:
        """Attend to pruned keys and values alone."""
        table = metadata.block_table
        if metadata.chunks is not None:
            self.attend_chunks(call, table, metadata.chunks)
        if metadata.rows is not None:
            self.attend_rows(call, table, metadata.rows, metadata.max_context)
