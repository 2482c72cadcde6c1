"""What the block manager remembers of a running request."""

from dataclasses import dataclass
from typing import Any

from think_vllm.plan.spans import SpanRule


@dataclass(slots=True)
class Life:
    """One request, from its admission until it ends or is preempted.

    Args:
        rule: When its spans are thin.
        settled: Whether its worker has said that it may be compacted, or that it stays dense.
        request: vLLM's own; None until its first step is scheduled, or without prefix caching.
        prompt_len: Tokens of its prompt; None until known.
        cached_spans: Leading spans that came thin from the prefix cache.
        freed_spans: Spans whose tails it does not hold any more, or never did.
        published: Rows that the prefix cache has been offered.
        published_spans: Thin spans that it has been offered.
        uncached_spans: Spans whose dense form must not be offered any more.
        next_free: Processed tokens before which no further tail comes free.
        next_compaction: Scheduled tokens before which no further span is compacted.
        scheduled: Tokens that will have been computed after the step that is being scheduled.
    """

    rule: SpanRule
    settled: bool = True
    request: Any = None
    prompt_len: int | None = None
    cached_spans: int = 0
    freed_spans: int = 0
    published: int = 0
    published_spans: int = 0
    uncached_spans: int = 0
    next_free: int = 0
    next_compaction: int = 0
    scheduled: int = 0
