"""One layer's part of eviction: add up attention, choose tokens, pack them.

What a layer remembers of a request is kept under the request's id: attention so far while its
prompt runs, [Hk, P] float32, then the chosen tokens for one step more.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from think_vllm.worker.channel_selection import Chooser
from think_vllm.worker.eviction_step import Pack, Watched
from think_vllm.worker.kernels import Kernels
from think_vllm.worker.token_selection import add_attention, choose_tokens, gather_tokens, pool


@dataclass(frozen=True)
class Kept:
    """What is kept of a prompt that has ended.

    Args:
        tokens: int64 [Hk, count]. Each head's old tokens.
        energy: float32 [S, Hk, D]. Of the observation window, for each source of the layer's
            ``Chooser``; None if nothing is pruned.
    """

    tokens: torch.Tensor
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

    def watch(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        watched: Sequence[Watched],
        energies: Mapping[int, torch.Tensor],
        known: Container[str],
    ) -> None:
        """Add up the attention of a step's queries, and choose where prompts end.

        Args:
            query: [num_tokens, Hq, D].
            kv_cache: [num_blocks, Hk, N, 2 * D]. Holds the step's keys, densely.
            block_table: int32 [num_reqs, width].
            watched: Whose queries.
            energies: float32 [S, Hk, D] by row of the batch: mean squares, or any multiple, of
                the observation windows that end here; empty if nothing is pruned.
            known: Ids of all requests that there still are.
        """
        for held in (self._sums, self._kept):
            for name in [name for name in held if name not in known]:
                del held[name]  # it went away before its prompt was packed
        num_kv_heads, kernels = kv_cache.shape[1], self.kernels
        for seen in watched:
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
                tokens = self._choose(sums, seen.prompt_len, seen.kept_spans)
                self._kept[seen.request] = Kept(tokens, energies.get(seen.row))

    def _choose(self, sums: torch.Tensor, prompt_len: int, kept_spans: int) -> torch.Tensor:
        rule = self.plan.rule
        old = rule.prompt_spans(prompt_len) * rule.span_tokens
        if self.plan.config.kv_evict == "snapkv":
            # Its scores end where the observation window begins, or behind the last old token.
            sums = pool(sums, max(old, prompt_len - self.plan.config.kv_observation_window))
        return choose_tokens(sums[:, :old], kept_spans * rule.span_tokens)

    def pack(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        packs: Sequence[Pack],
        chooser: Chooser | None,
    ) -> list[torch.Tensor | None]:
        """Compact what is kept of prompts, in their last old spans.

        Channels are chosen over all keys that the prompt keeps, the recent ones included.

        Args:
            kv_cache: [num_blocks, Hk, N, 2 * D]. Written.
            block_table: int32 [num_reqs, width].
            packs: Prompts, all of whose blocks are dense.
            chooser: Of the layer's channels. Not asked, and may be None, if nothing is pruned.

        Returns:
            Channels of each, uint8 [Hk, K]; None if nothing is pruned.
        """
        plan, chosen = self.plan, []
        for pack in packs:
            kept = self._kept.pop(pack.request)
            old = (pack.first_span + pack.num_spans) * plan.span_tokens
            blocks = self._blocks(block_table, pack.row, 0, old)
            # A copy: compaction writes into blocks that kept tokens are read from.
            packed = gather_tokens(kv_cache, blocks, kept.tokens, plan, self.kernels.form)
            channels = None
            if chooser is not None and kept.energy is not None and plan.prunes:
                keys = None
                if chooser.uses_keys:
                    keys = self._energy_of_kept(kv_cache, block_table, pack, packed)[None]
                choice = chooser.choose(kept.energy[None], keys)
                choice.report()
                channels = choice.channels[0]
            if plan.rule.shrinks:
                self._compact(packed, channels)
            written = packed.view(pack.num_spans, plan.span_blocks, *packed.shape[1:])[
                :, : plan.thin_blocks
            ]
            spans = blocks.view(-1, plan.span_blocks)[pack.first_span :, : plan.thin_blocks]
            kv_cache[spans.flatten()] = written.flatten(0, 1)
            chosen.append(channels)
        return chosen

    def _energy_of_kept(
        self, kv_cache: torch.Tensor, block_table: torch.Tensor, pack: Pack, packed: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared keys of packed tokens and those behind them: float32 [Hk, D]."""
        plan = self.plan
        num_kept = pack.num_spans * plan.span_tokens
        old_blocks = (pack.first_span + pack.num_spans) * plan.span_blocks
        num_rest = pack.prompt_len - old_blocks * plan.block_size
        table = torch.arange(len(packed), dtype=torch.int32, device=packed.device)[None]
        energy = self._key_energy(packed, table, 0, num_kept, 0) * num_kept
        if num_rest:
            rest = self._key_energy(kv_cache, block_table, pack.row, pack.prompt_len, old_blocks)
            energy = energy + rest * num_rest
        return energy / (num_kept + num_rest)

    def _blocks(self, block_table: torch.Tensor, row: int, begin: int, end: int) -> torch.Tensor:
        """Blocks of a row's tokens ``begin .. end - 1``: int64."""
        size = self.plan.block_size
        return block_table[row, begin // size : -(-end // size)].long()

    def _key_energy(
        self,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        row: int,
        num_tokens: int,
        first_block: int,
    ) -> torch.Tensor:
        """Mean squared keys of a row's tokens from a block on: float32 [Hk, D]."""
        request, length, first = (
            torch.full((1,), number, dtype=torch.int32, device=kv_cache.device)
            for number in (row, num_tokens, first_block)
        )
        dense = num_tokens - first_block * self.plan.block_size
        return self.kernels.key_energy(kv_cache, block_table, request, length, first, dense)[0]

    def _compact(self, packed: torch.Tensor, channels: torch.Tensor | None) -> None:
        """Compact spans of dense blocks in place, which lie one after the other.

        Args:
            packed: [spans * span_blocks, Hk, N, 2 * D]. Written.
            channels: uint8 [Hk, K]; None for all of them.
        """
        plan, device = self.plan, packed.device
        span = torch.arange(len(packed) // plan.span_blocks, dtype=torch.int32, device=device)
        if channels is not None:
            channels = channels.repeat(len(span), 1, 1)
        table = torch.arange(len(packed), dtype=torch.int32, device=device)[None]
        self.kernels.compact_spans(packed, table, torch.zeros_like(span), span, channels)
