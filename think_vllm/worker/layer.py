"""One layer's attention over thin and dense blocks, the same on all devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch

from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.channel_selection import ChannelSelector
from think_vllm.worker.device import AttentionKernels, Blocks, Kernels, LayerCall
from think_vllm.worker.evictor import Evictor
from think_vllm.worker.heads import RankHeads
from think_vllm.worker.loss_limit import loss_limit
from think_vllm.worker.metadata_builder import ThinkMetadata
from think_vllm.worker.state import GroupState
from think_vllm.worker.step_tensors import (
    Chunks,
    DueSpans,
    FinishedTensors,
    Observed,
    PassTensors,
    Rows,
)
from think_vllm.worker.tokens import put_back

K = TypeVar("K", bound=AttentionKernels)


class AttentionLayer(ABC, Generic[K]):
    """What a step does in one layer: attention over its queries, part by part.

    Args:
        kernels: Of the device.
    """

    def __init__(self, kernels: K) -> None:
        self.kernels = kernels

    def name(self, layer_name: str) -> None:
        """Say which layer it is. The first forward pass knows, vLLM's own at start-up."""

    @abstractmethod
    def run(self, call: LayerCall, metadata: Any) -> None:
        """Attend.

        Args:
            call: Its output is written.
            metadata: Of this step.
        """

    def attend_chunks(self, call: LayerCall, table: torch.Tensor, chunks: Chunks) -> None:
        """Attend with requests that have several queries each; see ``AttentionKernels``."""
        where = chunks.tokens
        answer = call.output[where]  # a view for a slice, a copy for indices
        self.kernels.attend_chunks(call, table, chunks, answer)
        put_back(call.output, where, answer)

    def attend_rows(
        self, call: LayerCall, table: torch.Tensor, rows: Rows, max_context: int
    ) -> None:
        """Attend with single queries; see ``AttentionKernels``."""
        where, blocks = rows.tokens, Blocks(call.kv_cache, table)
        answer = call.output[where]
        self.kernels.attend_rows(call.query[where], blocks, rows, answer, max_context)
        put_back(call.output, where, answer)


class ThinkLayer(AttentionLayer[Kernels]):
    """What a step does in one layer; see ``worker/step.py`` for the order of work.

    Args:
        plan: How blocks are pruned, quantized and evicted.
        heads: Of the rank; of which layer they are, its name says.
        kernels: Of the device.
    """

    def __init__(self, plan: BlockPlan, heads: RankHeads, kernels: Kernels) -> None:
        super().__init__(kernels)
        self.plan = plan
        self.evictor = Evictor(kernels) if plan.config.evicts else None
        self._heads = heads
        self._selector: ChannelSelector | None = None

    def name(self, layer_name: str) -> None:
        """Say whose heads they are."""
        if self._selector is None:
            self._selector = ChannelSelector(self.plan, self._heads.of_layer(layer_name))

    def run(self, call: LayerCall, metadata: ThinkMetadata) -> None:
        """Attend, and compact what has become old; keys and values are stored densely before."""
        tensors, kv_cache = metadata.tensors, call.kv_cache
        self.kernels.begin_step(kv_cache, metadata)
        for chunks in tensors.prompts:
            self.attend_chunks(call, metadata.block_table, chunks)
        # Only steps of prompts and of resumed requests have state to see to here.
        index = metadata.state.index[call.layer.layer_name]
        for accumulations, observed, ended in (
            (tensors.accumulations, tensors.observed, tensors.finished_prompts),
            ([], tensors.chunk_observed, tensors.finished_chunks),
        ):
            energy = None
            if observed is not None:
                energy = self._observe(call, observed, metadata.state.energy[index])
            if accumulations or ended is not None:
                with self.kernels.measure():
                    if accumulations:
                        self._accumulate(call, metadata, energy)
                    if ended is not None:
                        self._end(kv_cache, metadata, ended, energy, index)
        for decode in tensors.passes:
            if decode.repacks or decode.due is not None:
                with self.kernels.measure():
                    if decode.repacks:
                        self.repack(kv_cache, metadata.block_table, decode, metadata.state, index)
                    if decode.due is not None:
                        self._compact(kv_cache, metadata, index, decode.due)
            if decode.rows is not None:
                longest = metadata.max_context
                self.attend_rows(call, metadata.decode_table, decode.rows, longest)
            for chunks in decode.chunks:
                self.attend_chunks(call, metadata.decode_table, chunks)

    def _accumulate(
        self, call: LayerCall, metadata: ThinkMetadata, energy: torch.Tensor | None
    ) -> None:
        """Let the evictor see prompt queries, and the observation windows that end here."""
        assert self.evictor is not None
        tensors, ended = metadata.tensors, {}
        if energy is not None:
            # A sum stands for the mean over the window: the order of channels is the same.
            ended = dict(zip(tensors.ended_rows, energy.transpose(0, 1), strict=True))
        self.evictor.accumulate(
            call.query,
            call.kv_cache,
            metadata.block_table,
            tensors.accumulations,
            ended,
            metadata.known,
        )

    def repack(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        decode: PassTensors,
        state: GroupState,
        index: int,
    ) -> None:
        """Repack what is kept of prompts, and keep their channels for spans that fall due later.

        Args:
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            block_table: int32 [num_reqs, width].
            decode: The pass, with the prompts.
            state: Of the layers. Written.
            index: Of this layer.
        """
        assert self.evictor is not None
        selected = self.evictor.repack(kv_cache, block_table, decode.repacks, self._selector)
        for slot, channels in zip(decode.repack_slots, selected, strict=True):
            if channels is not None:
                state.channels[index, slot] = channels

    def _observe(self, call: LayerCall, observed: Observed, kept: torch.Tensor) -> torch.Tensor:
        """Add up observation windows; return the complete ones, float32 [S, n, Hk, D]."""
        assert self._selector is not None
        sources = self._selector.sources(call.query, call.output)
        energy = kept.new_zeros(len(sources), observed.begin.numel(), *kept.shape[2:])
        if observed.resumed is not None:
            energy[:, observed.resumed.index] = kept[observed.resumed.slot].transpose(0, 1)
        for source, total in zip(sources, energy, strict=True):
            self.kernels.add_query_energy(source, observed.begin, observed.end, total)
        if observed.kept is not None:
            kept[observed.kept.slot] = energy[:, observed.kept.index].transpose(0, 1)
        return energy[:, observed.ended]

    def _end(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkMetadata,
        ended: FinishedTensors,
        energy: torch.Tensor | None,
        index: int,
    ) -> None:
        """Select the channels of prompts or chunks that end here, and compact their spans."""
        channels = None
        if energy is not None:
            channels = self._select_channels(kv_cache, metadata, ended, energy)
            if ended.kept is not None:
                metadata.state.channels[index, ended.kept.slot] = channels[ended.kept.index]
            for slot, begin, count in ended.tables:
                tables = metadata.state.tables.setdefault(slot, {})
                tables[index] = channels[begin : begin + count]
            channels = channels[ended.span_selection]
        self.kernels.compact_spans(
            kv_cache,
            metadata.block_table,
            ended.span_request,
            ended.span,
            channels,
            metadata.workspace,
        )

    def _select_channels(
        self,
        kv_cache: torch.Tensor,
        metadata: ThinkMetadata,
        ended: FinishedTensors,
        energy: torch.Tensor,
    ) -> torch.Tensor:
        """Channels that are kept from here on: uint8 [m, Hk, K]."""
        assert self._selector is not None
        # A sum stands for the mean over the window: the order of channels is the same.
        windows = energy.transpose(0, 1)
        if ended.window is not None:
            windows = windows[ended.window]
        keys = None
        if self._selector.uses_keys:
            keys = self.kernels.key_energy(Blocks(kv_cache, metadata.block_table), ended.keys)
        selection = self._selector.select(windows, keys)
        selection.report(ended.final)
        if ended.names:
            loss_limit().add(ended.names, selection.kept_shares())
        return selection.channels

    def _compact(
        self, kv_cache: torch.Tensor, metadata: ThinkMetadata, index: int, due: DueSpans
    ) -> None:
        """Compact spans that have fallen due, with their request's channels."""
        channels = metadata.state.due_channels(due, index) if self.plan.prunes else None
        self.kernels.compact_spans(
            kv_cache, metadata.block_table, due.request, due.span, channels, metadata.workspace
        )
