"""What a device brings to a layer: the form of its dense blocks, and kernels over blocks.

Layers, metadata builders and eviction are the same on all devices. A new device is a subclass of
``Kernels``, and one of the metadata builder for what it prepares once for all layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan

if TYPE_CHECKING:
    from think_vllm.worker.metadata_builder import ThinkMetadata
    from think_vllm.worker.step_tensors import Chunks, KeyRanges, Rows


@dataclass(frozen=True)
class LayerCall:
    """vLLM's call of one layer in a step."""

    layer: Any  # vLLM's attention layer
    query: torch.Tensor  # [num_tokens, Hq, D]
    key: torch.Tensor  # [num_tokens, Hk, D]. Stored in the cache before
    value: torch.Tensor  # [num_tokens, Hk, D]. As ``key``
    kv_cache: torch.Tensor  # of the layer
    output: torch.Tensor  # [num_tokens, Hq, D]. Written for every query of the step


class Blocks(NamedTuple):
    """Blocks of one layer, and which of them requests have."""

    kv_cache: torch.Tensor  # the layer's
    table: torch.Tensor  # int32 [num_reqs, width]. The block table


class AttentionKernels(ABC):
    """Attention of one layer over blocks of any kind.

    Tensors of int32 are on the layer's device, and ``block_table`` is int32 [num_reqs, width].

    Args:
        scale: Factor on ``q . k``.
        logits_soft_cap: Of the layer's scores, 0 for none.
        sinks: [Hq]. Attention sinks of the layer; None for none.
    """

    def __init__(
        self, scale: float, logits_soft_cap: float = 0.0, sinks: torch.Tensor | None = None
    ) -> None:
        self.scale = scale
        self.logits_soft_cap = logits_soft_cap
        self.sinks = sinks

    @abstractmethod
    def attend_chunks(
        self, call: LayerCall, table: torch.Tensor, chunks: Chunks, out: torch.Tensor
    ) -> None:
        """Attend causally with several queries per request.

        Args:
            call: Of the layer, for the whole step.
            table: int32 [num_reqs, width]. That ``chunks.request`` is of.
            chunks: Which queries of the step attend.
            out: [tokens, Hq, D]. Of the chunks alone. Written.
        """

    @abstractmethod
    def attend_rows(
        self, query: torch.Tensor, blocks: Blocks, rows: Rows, out: torch.Tensor, max_context: int
    ) -> None:
        """Attend with single queries to thin, then dense blocks.

        Args:
            query: [R, Hq, D]. Of the rows alone, as is ``out``.
            blocks: Of the layer, and of the requests that ``rows`` names.
            rows: Whose queries they are.
            out: [R, Hq, D]. Written.
            max_context: Tokens of the longest context, at most.
        """


class Kernels(AttentionKernels):
    """Kernels of one layer over thin and dense blocks: ``kv_cache`` is [num_blocks, Hk, N, 2 * D].

    Args:
        plan: How blocks are pruned, quantized and evicted.
        scale: See ``AttentionKernels``, as for the others.
        logits_soft_cap: Of the layer's scores.
        sinks: Of the layer.

    Class attribute ``form`` is the form of the device's dense blocks.
    """

    form: BlockForm

    def __init__(
        self,
        plan: BlockPlan,
        scale: float,
        logits_soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> None:
        super().__init__(scale, logits_soft_cap, sinks)
        self.plan = plan

    def measure(self) -> AbstractContextManager[None]:
        """Measure the time that pruning and compaction take, where the host can."""
        return nullcontext()

    @abstractmethod
    def begin_step(self, kv_cache: torch.Tensor, metadata: ThinkMetadata) -> None:
        """Clear what lies behind contexts, where a kernel reads whole dense blocks.

        Those give what lies behind a context the weight zero, which leaves a NaN a NaN. A block
        that was thin before has codes or a channel table there, whose bytes can spell one.
        """

    @abstractmethod
    def add_query_energy(
        self, source: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, energy: torch.Tensor
    ) -> None:
        """Add queries ``begin[i] .. end[i] - 1`` to the ``i``-th window: float32 [n, Hk, D]."""

    @abstractmethod
    def key_energy(self, blocks: Blocks, keys: KeyRanges) -> torch.Tensor:
        """Average squared keys over dense blocks: float32 [n, Hk, D].

        Args:
            blocks: Of the layer, and of the requests that ``keys`` names.
            keys: Which ones.
        """

    @abstractmethod
    def compact_spans(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        request: torch.Tensor,
        span: torch.Tensor,
        channels: torch.Tensor | None,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """Rewrite dense spans as thin ones, in place.

        Args:
            kv_cache: Written.
            block_table: That ``request`` is of.
            request: int32 [n]. Row of the block table.
            span: int32 [n]. Span of that request.
            channels: uint8 [n, Hk, K]. Kept channels; None if nothing is pruned.
            workspace: Of the device's kernel; None if it needs none, or for one of its own.
        """
