"""Free blocks of compacted spans, and cache prefixes in either form.

vLLM's scheduler asks the manager of each KV cache group to drop blocks that are no longer
needed before it allocates new ones. Ours frees those that the worker has emptied by compacting
spans. Row indices never move: a freed entry becomes the null block, as in
vLLM's sliding-window and R-SWA managers, so slot mapping and lengths stay as they are.

Compaction writes into the first ``thin_blocks`` blocks of a span, its **leading blocks**. So

* a request never shares the leading blocks of a dense span: what it hits of them while another
  request holds them is copied, by vLLM's own copy-on-write, before its first step runs;
* leading blocks leave the prefix cache before the step is scheduled that overwrites them;
* thin spans enter it once the step that made them has been processed, and are never written
  again, so any number of requests may share them.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from think_vllm.errors import REMEDY
from think_vllm.metrics.catalog import SpanCounts
from think_vllm.plan.spans import SpanRule
from think_vllm.scheduler.prefix import find_thin_prefix, limits_of
from think_vllm.scheduler.publisher import Publisher
from think_vllm.scheduler.request_state import RequestRules, RequestState


class ThinKVCacheManager(FullAttentionManager):
    """Manager of a group of full-attention layers whose old spans are thin."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rule: SpanRule = kv_cache_spec.rule
        self._states: dict[str, RequestState] = {}
        #: Rows of a request that hold blocks of others until copies are allocated.
        self._private: dict[str, list[int]] = {}
        self._publisher = Publisher(self.block_pool, self.kv_cache_group_id, kv_cache_spec)
        self.counts = SpanCounts()
        self.rules = RequestRules(kv_cache_spec.limits_loss)

    def resolve(self, request: Any, dense: bool) -> None:
        """Receive whether a request whose prompt has ended stays dense, before its next step."""
        self.rules.resolve(request, dense)
        state = self._states.get(request.request_id)
        if state is not None:
            state.rule, state.resolved = self.rules.find(request.request_id, self.rule)
            state.next_free = state.next_compaction = 0

    # -- Admission ---------------------------------------------------------------------------

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Find the longest cached prefix, as thin spans and dense blocks behind, or dense alone.

        The observation window is left to be computed: its queries select the channels. Of
        equally long prefixes the dense one is taken, which is exact.
        """
        limit = max(0, max_length + 1 - max(1, kv_cache_spec.observation_window))
        limits = limits_of(block_hashes)
        if limits is not None:
            limit = min(limit, limits.max_tokens)
        dense, length = super().find_longest_cache_hit(
            block_hashes, limit, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        if not kv_cache_spec.thin_prefixes:
            return dense, length
        rule, (group,) = kv_cache_spec.rule, kv_cache_group_ids
        rows = find_thin_prefix(block_pool, block_hashes, limit, group, rule)
        if len(rows) * rule.block_size <= length:
            return dense, length
        return (rows,), len(rows) * rule.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Count the blocks that a request needs, copies of blocks that others hold included."""
        if request_id in self.num_cached_block:
            # A running request: as vLLM's own, which thousands of calls per second are worth.
            missing: int = -(-num_tokens // self.block_size) - len(self.req_to_blocks[request_id])
            return missing if missing > 0 else 0
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        if new_computed_blocks:
            needed += len(self._held_leading_blocks(new_computed_blocks))
        if apply_admission_cap and self.rule.prune_prefill:
            # Spans of the prompt come back while it is computed.
            needed = min(needed, self.kv_cache_spec.max_blocks(num_tokens))
        return needed

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give a new request the cached blocks that it hit."""
        held = self._held_leading_blocks(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        cached = self._count_thin(new_computed_blocks)
        self.counts.hit_tokens += cached * self.rule.span_tokens
        self._states[request_id] = RequestState(
            *self.rules.find(request_id, self.rule),
            cached_spans=cached,
            freed_spans=cached,
            published=len(new_computed_blocks),
        )
        if held:
            self._private[request_id] = held

    # -- Running -----------------------------------------------------------------------------

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        """Allocate what a step needs, copies of blocks that others hold included.

        All of that has been counted at admission, over all groups: it must be taken before
        ``cache_blocks`` of any group takes blocks that happen to be free.
        """
        # ``cache_blocks`` receives whole blocks only, beside groups with a window.
        self._state_of(request_id).scheduled = num_tokens_main_model
        if self._private:
            self._copy_held(request_id)
        blocks: list[Any] = super().allocate_new_blocks(
            request_id, num_tokens, num_tokens_main_model
        )
        return blocks

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int] = (),
    ) -> None:
        """Cache what stays dense for now, and uncache what the step is going to compact.

        Called when a step is scheduled. Blocks enter the cache one step after their last token
        was scheduled: a copy of them runs before its step does.

        Args:
            request: The request.
            num_tokens: Tokens that will have been computed after the step.
            retention_interval: Of sparse retention, which full attention does not have.
            replay_boundaries: As ``retention_interval``.
        """
        state = self._state_of(request.request_id)
        state.request = request
        computed = request.num_computed_tokens
        full = min(num_tokens, computed) // self.block_size
        # Tokens that steps in flight have yet to sample are not among ``num_tokens``.
        scheduled = max(computed + 1, num_tokens, state.scheduled)
        if full <= state.published and scheduled < state.next_compaction:
            return  # most steps of most requests
        publisher, rows = self._publisher, self.req_to_blocks[request.request_id]
        prompt_len = request.num_prompt_tokens
        compacted = state.rule.freeable_spans(prompt_len, scheduled, state.cached_spans)
        self._check_resolved(state, compacted, request.request_id)
        state.next_compaction = state.rule.next_freeable(prompt_len, scheduled, compacted)
        if not self.rule.delay_prompt:
            publisher.uncache(state, rows, compacted)
        publisher.publish_dense(state, rows, full)
        if self.rule.delay_prompt:
            publisher.copy_leading_blocks(state, rows, compacted, self._pending_cow_copies)
        self.num_cached_block[request.request_id] = state.published

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the blocks that spans no longer need since the worker made them thin.

        Args:
            request_id: The request.
            processed_computed_tokens: Tokens whose forward pass has finished; the worker
                reads nothing of what they made free.
            num_prompt_tokens: Length of the prompt. None means unknown: nothing is freed.

        Raises:
            NotImplementedError: If a prompt grows, as those of streaming-input sessions do:
                thin blocks cannot become dense again.
        """
        state = self._states.get(request_id)
        if (
            state is not None
            and processed_computed_tokens < state.next_free
            and num_prompt_tokens == state.prompt_len
        ):
            return  # most steps of most requests
        if num_prompt_tokens is None or request_id not in self.req_to_blocks:
            return
        state = self._state_of(request_id)
        if state.prompt_len is None:
            state.prompt_len = num_prompt_tokens
        if state.prompt_len != num_prompt_tokens:
            raise NotImplementedError(
                f"think-vllm: the prompt of request {request_id} grew from {state.prompt_len} to "
                f"{num_prompt_tokens} tokens (streaming input); thin KV blocks do not support "
                f"sessions. {REMEDY}"
            )
        rule = state.rule
        freeable = rule.freeable_spans(
            num_prompt_tokens, processed_computed_tokens, state.cached_spans
        )
        self._check_resolved(state, freeable, request_id)
        self._publisher.publish_thin(state, self.req_to_blocks[request_id], freeable)
        evicted = rule.evicted_spans(num_prompt_tokens)
        for span in range(state.freed_spans, freeable):
            first = span * rule.span_blocks
            kept = 0 if span < evicted else rule.thin_blocks
            self._remove_blocks_in_range(request_id, first + kept, first + rule.span_blocks)
            self.counts.spans += 1
            self.counts.blocks += rule.span_blocks - kept
        state.freed_spans = max(state.freed_spans, freeable)
        state.next_free = rule.next_freeable(num_prompt_tokens, processed_computed_tokens, freeable)

    def held(self, request_id: str) -> tuple[int, int, int]:
        """Rows of a request's block table, spans that have freed blocks, and empty spans."""
        state, rows = self._states.get(request_id), len(self.req_to_blocks.get(request_id, ()))
        if state is None:
            return rows, 0, 0
        empty = state.rule.evicted_spans(state.prompt_len or 0)
        return rows, state.freed_spans, min(state.freed_spans, empty)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Cache what a finished or preempted request leaves; vLLM then frees its blocks."""
        state = self._states.pop(request_id, None)
        self._private.pop(request_id, None)
        if state is not None and state.request is not None:
            self._publisher.leave(state, self.req_to_blocks[request_id])
        self._publisher.copies.publish()
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks

    def new_step_starts(self) -> None:
        """Let requests find the copies that earlier steps have made."""
        self._publisher.copies.publish()

    def _copy_held(self, request_id: str) -> None:
        """Give a new request copies of leading blocks that others hold, counted at admission."""
        rows, indices = self.req_to_blocks[request_id], self._private.pop(request_id, [])
        copies = self.block_pool.get_new_blocks(len(indices))
        for index, copy in zip(indices, copies, strict=True):
            self._apply_cow(request_id, index, rows[index], copy)

    def _state_of(self, request_id: str) -> RequestState:
        state = self._states.get(request_id)
        if state is None:
            state = self._states[request_id] = RequestState(*self.rules.find(request_id, self.rule))
        return state

    def _check_resolved(self, state: RequestState, spans: int, request_id: str) -> None:
        if spans and not state.resolved:
            raise RuntimeError(
                f"think-vllm: spans of request {request_id} are due, and its worker has not said "
                "whether it stays dense"
            )

    def _count_thin(self, rows: Sequence[Any]) -> int:
        """Leading spans of a hit that are thin."""
        last_blocks = rows[self.rule.span_blocks - 1 :: self.rule.span_blocks]
        return sum(block.is_null for block in last_blocks)

    def _held_leading_blocks(self, rows: Sequence[Any]) -> list[int]:
        """Rows of a hit whose dense block another request holds, and this one would write."""
        first = self._count_thin(rows) * self.rule.span_blocks
        return [
            index
            for index in range(first, len(rows))
            if index % self.rule.span_blocks < self.rule.thin_blocks and rows[index].ref_cnt > 0
        ]
