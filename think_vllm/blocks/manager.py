"""Free the tails of compacted spans, and cache prefixes in either form.

vLLM's scheduler asks the manager of each KV cache group to drop blocks that are no longer
needed before it allocates new ones. Ours answers with the tails of the spans that the worker
has compacted by then. Row indices never move: a freed entry becomes the null block, as in
vLLM's sliding-window and R-SWA managers, so slot mapping and lengths stay as they are.

Compaction writes into the first ``thin_blocks`` blocks of a span, its **heads**. So

* a request never shares the heads of a dense span: what it hits of them while somebody else
  holds them is copied, by vLLM's own copy-on-write, before its first step runs;
* heads leave the prefix cache before the step is scheduled that overwrites them;
* thin spans enter it once the step that made them has been processed, and are never written
  again, so any number of requests may share them.
"""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

from think_vllm.blocks.copies import CacheCopies
from think_vllm.blocks.life import Life
from think_vllm.blocks.prefix import (
    ResumedHashes,
    approximate_group,
    cache_thin,
    find_dense_behind,
    find_thin,
)
from think_vllm.errors import WAY_OUT
from think_vllm.spans import SpanRule


class ThinKVCacheManager(FullAttentionManager):
    """Manager of a group of full-attention layers whose old spans are thin."""

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rule: SpanRule = kv_cache_spec.rule
        self._lives: dict[str, Life] = {}
        self._copies = CacheCopies(self.block_pool)

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

        The observation window is left to be computed: its queries choose the channels. Of
        equally long prefixes the dense one is taken, which is exact.
        """
        limit = max(0, max_length + 1 - max(1, kv_cache_spec.observation_window))
        thin = kv_cache_spec.thin_prefixes
        if isinstance(block_hashes, ResumedHashes):
            limit = min(limit, block_hashes.max_tokens)
            thin = thin and block_hashes.thin
        dense, length = super().find_longest_cache_hit(
            block_hashes, limit, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        if not thin:
            return dense, length
        rule, (group,) = kv_cache_spec.rule, kv_cache_group_ids
        rows = find_thin(block_pool, block_hashes, limit, group, rule)
        if not rows:
            return dense, length
        last = limit // rule.block_size
        if rule.prune_prefill:
            # The worker takes every older span for thin.
            last = min(last, len(rows) + rule.span_blocks - 1)
        rows += find_dense_behind(block_pool, block_hashes, len(rows), last, group)
        if len(rows) * rule.block_size <= length:
            return dense, length
        return (rows,), len(rows) * rule.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Count the blocks that a request needs, copies of heads that others hold included."""
        needed: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            *args,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        if request_id not in self.num_cached_block:
            needed += len(self._held_heads(new_computed_blocks))
        if apply_admission_cap and self.rule.prune_prefill:
            # Spans of the prompt come back while it is computed.
            needed = min(needed, self.kv_cache_spec.max_blocks(num_tokens))
        return needed

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give a new request the cached blocks that it hit."""
        held = self._held_heads(new_computed_blocks)
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kwargs)
        cached = self._count_thin(new_computed_blocks)
        self._lives[request_id] = Life(
            cached_spans=cached,
            freed_spans=cached,
            published=len(new_computed_blocks),
            private=held,
        )

    def allocate_new_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Allocate new blocks; first of all those for copies of heads that others hold."""
        life = self._lives.get(request_id)
        copies = []
        if life is not None and life.private:
            rows = self.req_to_blocks[request_id]
            copies = self.block_pool.get_new_blocks(len(life.private))
            for index, copy in zip(life.private, copies, strict=True):
                self._apply_cow(request_id, index, rows[index], copy)
            life.private = []
        new: list[Any] = super().allocate_new_blocks(request_id, *args, **kwargs)
        return copies + new

    # -- Running -----------------------------------------------------------------------------

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Cache what stays dense for now, and uncache what the step is going to compact.

        Called when a step is scheduled. Blocks enter the cache one step after their last token
        was scheduled: a copy of them runs before its step does.

        Args:
            request: The request.
            num_tokens: Tokens that will have been computed after the step.
            args: Of sparse retention, which full attention does not have.
            kwargs: As ``args``.
        """
        life = self._lives.setdefault(request.request_id, Life())
        life.request = request
        computed = request.num_computed_tokens
        # Tokens that steps in flight have yet to sample are not among ``num_tokens``.
        compacted = self.rule.freeable_spans(
            request.num_prompt_tokens, max(computed + 1, num_tokens), life.cached_spans
        )
        if not self.rule.delay_prompt:
            self._uncache(life, compacted)
        self._publish_dense(life, min(num_tokens, computed) // self.block_size)
        if self.rule.delay_prompt:
            self._move_heads(life, compacted)
        self.num_cached_block[request.request_id] = life.published

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free the tails of spans that the worker has made thin.

        Args:
            request_id: The request.
            processed_computed_tokens: Tokens whose forward pass has finished; the worker
                reads nothing of what they made free.
            num_prompt_tokens: Length of the prompt. None means unknown: nothing is freed.

        Raises:
            NotImplementedError: If a prompt grows, as those of streaming-input sessions do:
                thin blocks cannot become dense again.
        """
        if num_prompt_tokens is None or request_id not in self.req_to_blocks:
            return
        life = self._lives.setdefault(request_id, Life())
        if life.prompt_len is None:
            life.prompt_len = num_prompt_tokens
        if life.prompt_len != num_prompt_tokens:
            raise NotImplementedError(
                f"think-vllm: the prompt of request {request_id} grew from {life.prompt_len} to "
                f"{num_prompt_tokens} tokens (streaming input); thin KV blocks do not support "
                f"sessions. {WAY_OUT}"
            )
        freeable = self.rule.freeable_spans(
            num_prompt_tokens, processed_computed_tokens, life.cached_spans
        )
        self._publish_thin(life, freeable)
        for span in range(life.freed_spans, freeable):
            first = span * self.rule.span_blocks
            self._remove_blocks_in_range(
                request_id, first + self.rule.thin_blocks, first + self.rule.span_blocks
            )
        life.freed_spans = max(life.freed_spans, freeable)

    # -- The end -----------------------------------------------------------------------------

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        """Cache what a finished or preempted request leaves; vLLM then frees its blocks."""
        life = self._lives.pop(request_id, None)
        if life is not None and life.request is not None:
            self._leave(life)
        self._copies.publish()
        blocks: list[Any] = super().pop_blocks_for_free(request_id)
        return blocks

    def _leave(self, life: Life) -> None:
        request, rule = life.request, self.rule
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        prompt_len = request.num_prompt_tokens
        thin = rule.freeable_spans(prompt_len, processed, life.cached_spans)
        self._publish_thin(life, thin)
        if request.num_in_flight_tokens == 0:
            # Nothing else will be compacted.
            life.published = life.uncached_spans = 0
            self._publish_dense(life, processed // self.block_size, thin * rule.span_blocks)
        if not request.is_finished():
            # Its observation window must be computed again. What it has computed from dense
            # blocks it computes again from such: over thin ones, even its own, it might go on
            # with other tokens.
            window = max(1, self.kv_cache_spec.observation_window)
            request.block_hashes = ResumedHashes(
                request.block_hashes,
                max_tokens=max(0, prompt_len - window),
                thin=life.cached_spans > 0 or rule.prune_prefill,
            )

    def new_step_starts(self) -> None:
        """Let requests find the copies that earlier steps have made."""
        self._copies.publish()

    # -- The cache ---------------------------------------------------------------------------

    def _publish_dense(self, life: Life, num_blocks: int, first: int = 0) -> None:
        """Cache a request's dense blocks up to a row, but for spans that leave the cache."""
        start = max(first, life.published, life.uncached_spans * self.rule.span_blocks)
        exact = 0
        if life.cached_spans == 0:
            exact = self.rule.exact_tokens(life.request.num_prompt_tokens) // self.block_size
        middle, group = min(max(start, exact), num_blocks), self.kv_cache_group_id
        self._publish_rows(life, start, middle, group)
        if self.kv_cache_spec.thin_prefixes:
            self._publish_rows(life, middle, num_blocks, approximate_group(group))
        life.published = max(life.published, num_blocks)

    def _publish_rows(self, life: Life, start: int, end: int, group: int) -> None:
        if end > start:
            rows = self.req_to_blocks[life.request.request_id]
            self.block_pool.cache_full_blocks(
                request=life.request,
                blocks=rows,
                num_cached_blocks=start,
                num_full_blocks=end,
                block_size=self.block_size,
                kv_cache_group_id=group,
                block_mask=[block.block_hash is None for block in rows[start:end]],
            )

    def _publish_thin(self, life: Life, num_spans: int) -> None:
        if life.request is None or not self.kv_cache_spec.thin_prefixes:
            return
        rule, rows = self.rule, self.req_to_blocks[life.request.request_id]
        for span in range(life.published_spans, num_spans):
            first, end = span * rule.span_blocks, (span + 1) * rule.span_blocks
            if span >= life.cached_spans:
                cache_thin(
                    self.block_pool,
                    life.request.block_hashes[end - 1],
                    rows[first : first + rule.thin_blocks],
                    end * rule.block_size,
                    self.kv_cache_group_id,
                    rule,
                )
        life.published_spans = max(life.published_spans, num_spans)

    def _uncache(self, life: Life, num_spans: int) -> None:
        """Take spans out of the cache that the worker is about to compact."""
        rows = self.req_to_blocks[life.request.request_id]
        first = max(life.uncached_spans, life.cached_spans) * self.rule.span_blocks
        last = min(num_spans * self.rule.span_blocks, len(rows))
        self.block_pool.evict_blocks({b.block_id for b in rows[first:last] if not b.is_null})
        life.uncached_spans = max(life.uncached_spans, num_spans)

    def _move_heads(self, life: Life, num_spans: int) -> None:
        """Have the heads of spans copied, so that their exact form stays in the cache."""
        rows = self.req_to_blocks[life.request.request_id]
        for span in range(max(life.uncached_spans, life.cached_spans), num_spans):
            first = span * self.rule.span_blocks
            heads = rows[first : first + self.rule.thin_blocks]
            if not self._copies.move(heads, self._pending_cow_copies):
                break
            life.uncached_spans = span + 1
        self._uncache(life, num_spans)

    def _count_thin(self, rows: Sequence[Any]) -> int:
        """Leading spans of a hit that are thin."""
        tails = rows[self.rule.span_blocks - 1 :: self.rule.span_blocks]
        return sum(block.is_null for block in tails)

    def _held_heads(self, rows: Sequence[Any]) -> list[int]:
        """Rows of a hit whose dense block somebody else holds, and this request would write."""
        first = self._count_thin(rows) * self.rule.span_blocks
        return [
            index
            for index in range(first, len(rows))
            if index % self.rule.span_blocks < self.rule.thin_blocks and rows[index].ref_cnt > 0
        ]
