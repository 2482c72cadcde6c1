"""Put a request's blocks into the prefix cache, and take them out before they are overwritten."""

from typing import Any

from think_vllm.plan.spans import SpanRule
from think_vllm.scheduler.copies import CacheCopies
from think_vllm.scheduler.prefix import (
    LimitedHashes,
    approximate_group,
    block_hashes_of,
    cache_thin,
)
from think_vllm.scheduler.request_state import RequestState


class Publisher:
    """What requests of one group of layers offer the prefix cache.

    Args:
        pool: vLLM's block pool.
        group: KV cache group.
        spec: Of its layers.
    """

    def __init__(self, pool: Any, group: int, spec: Any) -> None:
        self._pool = pool
        self._group = group
        self._rule: SpanRule = spec.rule
        self._thin: bool = spec.thin_prefixes
        self._observation_window: int = spec.observation_window
        self.copies = CacheCopies(pool)

    def publish_dense(self, state: RequestState, rows: list[Any], num_blocks: int) -> None:
        """Cache a request's dense blocks up to a row, but for spans that leave the cache."""
        start = max(state.published, state.uncached_spans * self._rule.span_blocks)
        exact = 0
        if state.cached_spans == 0:
            exact = state.rule.exact_tokens(state.request.num_prompt_tokens)
        middle = min(max(start, exact // self._rule.block_size), num_blocks)
        self._publish_rows(state, rows, start, middle, self._group)
        if self._thin:
            self._publish_rows(state, rows, middle, num_blocks, approximate_group(self._group))
        state.published = max(state.published, num_blocks)

    def _publish_rows(
        self, state: RequestState, rows: list[Any], start: int, end: int, group: int
    ) -> None:
        if end > start:
            self._pool.cache_full_blocks(
                request=state.request,
                blocks=rows,
                num_cached_blocks=start,
                num_full_blocks=end,
                block_size=self._rule.block_size,
                kv_cache_group_id=group,
                block_mask=[block.block_hash is None for block in rows[start:end]],
            )

    def publish_thin(self, state: RequestState, rows: list[Any], num_spans: int) -> None:
        """Cache the thin spans that a request has made up to a span."""
        if state.request is None or not self._thin:
            return
        rule = self._rule
        hashes = block_hashes_of(state.request.block_hashes, self._pool, rule)
        for span in range(max(state.published_spans, state.cached_spans), num_spans):
            first, end = span * rule.span_blocks, (span + 1) * rule.span_blocks
            cache_thin(
                self._pool,
                hashes[end - 1],
                rows[first : first + rule.thin_blocks],
                end * rule.block_size,
                self._group,
                rule,
            )
        state.published_spans = max(state.published_spans, num_spans)

    def uncache(self, state: RequestState, rows: list[Any], num_spans: int) -> None:
        """Take spans out of the cache that the worker is about to compact."""
        first = max(state.uncached_spans, state.cached_spans) * self._rule.span_blocks
        last = min(num_spans * self._rule.span_blocks, len(rows))
        self._pool.evict_blocks({b.block_id for b in rows[first:last] if not b.is_null})
        state.uncached_spans = max(state.uncached_spans, num_spans)

    def copy_leading_blocks(
        self, state: RequestState, rows: list[Any], num_spans: int, pending: list[tuple[Any, Any]]
    ) -> None:
        """Have the leading blocks of such spans copied: their exact form stays in the cache.

        Args:
            state: The request's.
            rows: Its blocks.
            num_spans: Spans that are thin after the step.
            pending: Copies that vLLM runs before the step. Extended.
        """
        evicted = state.rule.evicted_spans(state.request.num_prompt_tokens)
        if evicted == 0 and not self._rule.shrinks:
            return  # nothing is written
        # Nor are spans that are left empty: their blocks stay in the cache where they are.
        state.uncached_spans = max(state.uncached_spans, min(evicted, num_spans))
        for span in range(max(state.uncached_spans, state.cached_spans), num_spans):
            first = span * self._rule.span_blocks
            if not self.copies.move(rows[first : first + self._rule.thin_blocks], pending):
                break
            state.uncached_spans = span + 1
        self.uncache(state, rows, num_spans)

    def leave(self, state: RequestState, rows: list[Any]) -> None:
        """Cache what a finished or preempted request leaves, and limit what it may hit again.

        Args:
            state: The request's, which is over.
            rows: Its blocks.
        """
        request, rule = state.request, state.rule
        processed = request.num_computed_tokens - request.num_in_flight_tokens
        prompt_len = request.num_prompt_tokens
        thin = rule.freeable_spans(prompt_len, processed, state.cached_spans)
        self.publish_thin(state, rows, thin)
        if request.num_in_flight_tokens == 0:
            # Nothing else will be compacted.
            state.published, state.uncached_spans = 0, thin
            self.publish_dense(state, rows, processed // rule.block_size)
        if not request.is_finished():
            # Its observation window must be computed again. What it has computed from dense
            # blocks it computes again from such: over thin ones, even its own, it might go on
            # with other tokens.
            own = prompt_len // rule.span_tokens if rule.prune_prefill else state.cached_spans
            window = max(1, self._observation_window)
            request.block_hashes = LimitedHashes(
                request.block_hashes, max_tokens=max(0, prompt_len - window), max_thin_spans=own
            )
