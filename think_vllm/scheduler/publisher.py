"""Put a request's blocks into the prefix cache, and take them out before they are overwritten."""

from typing import Any

from think_vllm.plan.spans import SpanRule
from think_vllm.scheduler.copies import CacheCopies
from think_vllm.scheduler.prefix import approximate_group, block_hashes_of, cache_thin
from think_vllm.scheduler.request_state import Life


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
        self.copies = CacheCopies(pool)

    def publish_dense(self, life: Life, rows: list[Any], num_blocks: int) -> None:
        """Cache a request's dense blocks up to a row, but for spans that leave the cache."""
        start = max(life.published, life.uncached_spans * self._rule.span_blocks)
        exact = 0
        if life.cached_spans == 0:
            exact = life.rule.exact_tokens(life.request.num_prompt_tokens)
        middle = min(max(start, exact // self._rule.block_size), num_blocks)
        self._publish_rows(life, rows, start, middle, self._group)
        if self._thin:
            self._publish_rows(life, rows, middle, num_blocks, approximate_group(self._group))
        life.published = max(life.published, num_blocks)

    def _publish_rows(self, life: Life, rows: list[Any], start: int, end: int, group: int) -> None:
        if end > start:
            self._pool.cache_full_blocks(
                request=life.request,
                blocks=rows,
                num_cached_blocks=start,
                num_full_blocks=end,
                block_size=self._rule.block_size,
                kv_cache_group_id=group,
                block_mask=[block.block_hash is None for block in rows[start:end]],
            )

    def publish_thin(self, life: Life, rows: list[Any], num_spans: int) -> None:
        """Cache the thin spans that a request has made up to a span."""
        if life.request is None or not self._thin:
            return
        rule = self._rule
        hashes = block_hashes_of(life.request.block_hashes, self._pool, rule)
        for span in range(max(life.published_spans, life.cached_spans), num_spans):
            first, end = span * rule.span_blocks, (span + 1) * rule.span_blocks
            cache_thin(
                self._pool,
                hashes[end - 1],
                rows[first : first + rule.thin_blocks],
                end * rule.block_size,
                self._group,
                rule,
            )
        life.published_spans = max(life.published_spans, num_spans)

    def uncache(self, life: Life, rows: list[Any], num_spans: int) -> None:
        """Take spans out of the cache that the worker is about to compact."""
        first = max(life.uncached_spans, life.cached_spans) * self._rule.span_blocks
        last = min(num_spans * self._rule.span_blocks, len(rows))
        self._pool.evict_blocks({b.block_id for b in rows[first:last] if not b.is_null})
        life.uncached_spans = max(life.uncached_spans, num_spans)

    def move_heads(
        self, life: Life, rows: list[Any], num_spans: int, pending: list[tuple[Any, Any]]
    ) -> None:
        """Have the heads of such spans copied, so that their exact form stays in the cache.

        Args:
            life: The request's.
            rows: Its blocks.
            num_spans: Spans that are thin after the step.
            pending: Copies that vLLM runs before the step. Extended.
        """
        evicted = life.rule.evicted_spans(life.request.num_prompt_tokens)
        if evicted == 0 and not self._rule.shrinks:
            return  # nothing is written
        # Nor are spans that are left empty: their blocks stay in the cache where they are.
        life.uncached_spans = max(life.uncached_spans, min(evicted, num_spans))
        for span in range(max(life.uncached_spans, life.cached_spans), num_spans):
            first = span * self._rule.span_blocks
            if not self.copies.move(rows[first : first + self._rule.thin_blocks], pending):
                break
            life.uncached_spans = span + 1
        self.uncache(life, rows, num_spans)
