"""One layer's part of eviction: add up attention, select tokens, repack them.

What a layer remembers of a request is kept under the request's id: attention so far while its
prompt runs, [Hk, P] float32, then the selected tokens for one step more.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from think_vllm.worker.channel_selection import ChannelSelector
from think_vllm.worker.device import Blocks, Kernels
from think_vllm.worker.eviction_step import Accumulation, Repack
from think_vllm.worker.step_tensors import KeyRanges
from think_vllm.worker.token_selection import add_attention, gather_tokens, pool, select_tokens


@dataclass(frozen=True)
class Kept:
    """What is kept of a prompt that has ended."""

    tokens: torch.Tensor  # int64 [Hk, count]. Each head's old tokens
    #: float32 [S, Hk, D]. Of the observation window, for each source of the layer's
    #: ``ChannelSelector``; None if nothing is pruned.
    energy: torch.Tensor | None


class Evictor:
    """Eviction in one layer. Nothing waits for the device.

    Args:
        kernels: Of the layer.
    """

    def __init__(self, kernels: Kernels) -> None:
        self.kernels = kernels
        self.plan = kernels.plan
        self._sums: dict[str, torch.Tensor] = {}
        self._kept: dict[str, Kept] = {}

    def accumulate(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        accumulations: Sequence[Accumulation],
        energies: Mapping[int, torch.Tensor],
        known: Container[str],
    ) -> None:
        """Add up the attention of a step's queries, and select where prompts end.

        Args:
            query: [num_tokens, Hq, D].
            kv_cache: [num_blocks, Hk, N, 2 * D]. Holds the step's keys, densely.
            block_table: int32 [num_reqs, width].
            accumulations: Whose queries.
            energies: float32 [S, Hk, D] by row of the batch: mean squares, or any multiple, of
                the observation windows that end here; empty if nothing is pruned.
            known: Ids of all requests that there still are.
        """
        for held in (self._sums, self._kept):
            for name in [name for name in held if name not in known]:
                del held[name]  # it went away before its prompt was repacked
        num_kv_heads, kernels = kv_cache.shape[1], self.kernels
        for seen in accumulations:
            if seen.starts:
                self._sums[seen.request] = torch.zeros(
                    num_kv_heads, seen.prompt_len, dtype=torch.float32, device=query.device
                )
            end = seen.position + seen.end - seen.begin
            add_attention(
                self._sums[seen.request],
                query[seen.begin : seen.end],
                kv_cache,
                self._blocks(block_table, seen.row, 0, end),
                seen.position,
                self.plan,
                kernels.scale,
                kernels.logits_soft_cap,
                kernels.sinks,
                kernels.form,
            )
            if seen.ends:
                sums = self._sums.pop(seen.request)
                tokens = self._select(sums, seen.prompt_len, seen.kept_spans)
                self._kept[seen.request] = Kept(tokens, energies.get(seen.row))

    def _select(self, sums: torch.Tensor, prompt_len: int, kept_spans: int) -> torch.Tensor:
        rule = self.plan.rule
        old = rule.prompt_spans(prompt_len) * rule.span_tokens
        if self.plan.config.kv_evict == "snapkv":
            # Its scores end where the observation window begins, or behind the last old token.
            sums = pool(sums, max(old, prompt_len - self.plan.config.kv_observation_window))
        return select_tokens(sums[:, :old], kept_spans * rule.span_tokens)

    def repack(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        repacks: Sequence[Repack],
        selector: ChannelSelector | None,
    ) -> list[torch.Tensor | None]:
        """Compact what is kept of prompts, in their last old spans.

        Channels are selected over all keys that the prompt keeps, the recent ones included.

        Args:
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            block_table: int32 [num_reqs, width].
            repacks: Prompts, all of whose blocks are dense.
            selector: Of the layer's channels. Not asked, and may be None, if nothing is pruned.

        Returns:
            Channels of each, uint8 [Hk, K]; None if nothing is pruned.
        """
        plan, selected = self.plan, []
        for repack in repacks:
            kept = self._kept.pop(repack.request)
            old = (repack.first_span + repack.num_spans) * plan.span_tokens
            blocks = self._blocks(block_table, repack.row, 0, old)
            # A copy: compaction writes into blocks that kept tokens are read from.
            repacked = gather_tokens(kv_cache, blocks, kept.tokens, plan, self.kernels.form)
            channels = None
            if selector is not None and kept.energy is not None and plan.prunes:
                keys = None
                if selector.uses_keys:
                    dense = Blocks(kv_cache, block_table)
                    keys = self._energy_of_kept(dense, repack, repacked)[None]
                selection = selector.select(kept.energy[None], keys)
                selection.report()
                channels = selection.channels[0]
            if plan.rule.shrinks:
                self._compact(repacked, channels)
            written = repacked.view(repack.num_spans, plan.span_blocks, *repacked.shape[1:])[
                :, : plan.thin_blocks
            ]
            spans = blocks.view(-1, plan.span_blocks)[repack.first_span :, : plan.thin_blocks]
            kv_cache[spans.flatten()] = written.flatten(0, 1)
            selected.append(channels)
        return selected

    def _energy_of_kept(
        self, blocks: Blocks, repack: Repack, repacked: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared keys of repacked tokens and those behind them: float32 [Hk, D]."""
        plan = self.plan
        num_kept = repack.num_spans * plan.span_tokens
        old_blocks = (repack.first_span + repack.num_spans) * plan.span_blocks
        num_rest = repack.prompt_len - old_blocks * plan.block_size
        energy = self._key_energy(_neighbours(repacked), 0, num_kept, 0) * num_kept
        if num_rest:
            rest = self._key_energy(blocks, repack.row, repack.prompt_len, old_blocks)
            energy = energy + rest * num_rest
        return energy / (num_kept + num_rest)

    def _blocks(self, block_table: torch.Tensor, row: int, begin: int, end: int) -> torch.Tensor:
        """Blocks of a row's tokens ``begin .. end - 1``: int64."""
        size = self.plan.block_size
        return block_table[row, begin // size : -(-end // size)].long()

    def _key_energy(
        self, blocks: Blocks, row: int, num_tokens: int, first_block: int
    ) -> torch.Tensor:
        """Mean squared keys of a row's tokens from a block on: float32 [Hk, D]."""
        request, length, first = (
            torch.full((1,), number, dtype=torch.int32, device=blocks.kv_cache.device)
            for number in (row, num_tokens, first_block)
        )
        dense = num_tokens - first_block * self.plan.block_size
        return self.kernels.key_energy(blocks, KeyRanges(request, length, first, dense))[0]

    def _compact(self, repacked: torch.Tensor, channels: torch.Tensor | None) -> None:
        """Compact spans of dense blocks in place, which lie one after the other.

        Args:
            repacked: [spans * span_blocks, Hk, N, 2 * D]. Written.
            channels: uint8 [Hk, K]; None for all of them.
        """
        plan, device = self.plan, repacked.device
        span = torch.arange(len(repacked) // plan.span_blocks, dtype=torch.int32, device=device)
        if channels is not None:
            channels = channels.repeat(len(span), 1, 1)
        blocks = _neighbours(repacked)
        self.kernels.compact_spans(*blocks, torch.zeros_like(span), span, channels)


def _neighbours(blocks: torch.Tensor) -> Blocks:
    """Blocks of one request, which lie one after the other."""
    table = torch.arange(len(blocks), dtype=torch.int32, device=blocks.device)[None]
    return Blocks(blocks, table)
