"""When a span is thin, and when its other blocks may be freed: the rule that both sides share.

The block manager (scheduler process) and the metadata builder (worker processes) never talk
about spans; each derives the same answer from numbers that vLLM gives to both: the prompt
length and the computed tokens. Pure integers, also on numpy arrays.

For a query at position ``p`` (so ``p`` tokens come before it) of a request whose prompt has
``P`` tokens, spans ``0 .. thin_spans(...) - 1`` are thin:

* the ``cached`` leading spans that came thin from the prefix cache, for every query;
* a prompt query (``p < P``) sees no other span thin, because ThinK prunes after the prompt; with
  ``prune_prefill`` it sees those thin that end ``recent_window`` tokens before its step's first;
* afterwards every span that ends at least ``recent_window`` tokens before ``p`` is thin
  (with ``prune_decode``), or every span that ended so before ``P`` (without).

The prompt's spans are compacted in the forward pass that ends the prompt; with ``delay_prompt`` in
the next one, so that the scheduler can have their dense blocks copied in between.

With a budget, a prompt of more spans keeps as many of its old tokens as ``budget_spans`` spans
hold, and has them in its last ones. The spans before these are empty: they count as thin, no query
reads them, and all their blocks come back.

A request may override the rule (``request.py``): another budget, or a recent window that never
ends, so that nothing of it is ever thin.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

#: Tokens of a recent window, or spans of a budget, that no request reaches.
ENDLESS = 1 << 40


@dataclass(frozen=True)
class SpanRule:
    """Which spans are thin, for which queries."""

    block_size: int  # tokens of a dense block
    span_blocks: int  # dense blocks of a span before compaction
    thin_blocks: int  # blocks of a span after compaction
    recent_window: int  # most recent tokens that always stay dense
    prune_decode: bool  # whether spans that fill while decoding are compacted too
    prune_prefill: bool = False  # whether spans are compacted at the end of each chunk of a prompt
    delay_prompt: bool = False  # whether a prompt's spans are compacted one step after its end
    budget_spans: int | None = None  # spans that a prompt keeps at most; None for all

    @property
    def span_tokens(self) -> int:
        """Tokens of a span."""
        return self.block_size * self.span_blocks

    @property
    def stays_dense(self) -> bool:
        """Whether no span ever becomes thin: the rule of a request that asked for it."""
        return self.recent_window >= ENDLESS

    @property
    def shrinks(self) -> bool:
        """Whether a span takes fewer blocks once it is thin."""
        return self.thin_blocks < self.span_blocks

    def prompt_spans(self, prompt_len: int) -> int:
        """Spans that the end of a prompt of ``prompt_len`` tokens compacts."""
        return max(0, prompt_len - self.recent_window) // self.span_tokens

    def evicted_spans(self, prompt_len: int) -> int:
        """Leading spans that are empty once they are thin."""
        if self.budget_spans is None:
            return 0
        return max(0, self.prompt_spans(prompt_len) - self.budget_spans)

    def prompt_spans_array(
        self, prompt_lens: IntArray, limits: RowLimits | None = None
    ) -> IntArray:
        """``prompt_spans`` over an array, whose rows may have limits of their own."""
        recent = self.recent_window if limits is None else limits.recent_window
        spans: IntArray = np.maximum(0, prompt_lens - recent) // self.span_tokens
        return spans

    def evicted_spans_array(
        self, prompt_lens: IntArray, limits: RowLimits | None = None
    ) -> IntArray:
        """``evicted_spans`` over an array, whose rows may have limits of their own."""
        if self.budget_spans is None:
            return np.zeros_like(prompt_lens)
        budget = self.budget_spans if limits is None else limits.budget_spans
        evicted: IntArray = np.maximum(0, self.prompt_spans_array(prompt_lens, limits) - budget)
        return evicted

    def thin_spans(self, prompt_len: int, position: int, computed: int = 0, cached: int = 0) -> int:
        """Thin spans of a request as its query at ``position`` sees them.

        Args:
            prompt_len: Tokens of the prompt.
            position: Of the query.
            computed: Tokens that were computed before the query's step.
            cached: Spans that came thin from the prefix cache.
        """
        if position < prompt_len:
            own = self.prompt_spans(computed) if self.prune_prefill else 0
        else:
            own = self.prompt_spans(position if self.prune_decode else prompt_len)
        return max(cached, own)

    def thin_spans_array(
        self,
        prompt_lens: IntArray,
        positions: IntArray,
        computed: IntArray,
        cached: IntArray,
        limits: RowLimits | None = None,
    ) -> IntArray:
        """``thin_spans`` over arrays of equal shape, whose rows may have limits of their own."""
        ends = positions if self.prune_decode else prompt_lens
        begins = computed if self.prune_prefill else np.zeros_like(computed)
        ends = np.where(positions < prompt_lens, begins, ends)
        thin: IntArray = np.maximum(cached, self.prompt_spans_array(ends, limits))
        return thin

    def exact_tokens(self, prompt_len: int) -> int:
        """Leading tokens whose queries have seen no thin span, if none came from the cache.

        The keys and values of all others are approximate.
        """
        if self.prune_prefill:
            return 0
        if self.prune_decode or self.prompt_spans(prompt_len) > 0:
            return max(prompt_len, self.due_position(0))
        return sys.maxsize

    def spans_before_decode(self, prompt_len: int, position: int, cached: int = 0) -> int:
        """Spans that are thin before the step of a query past its prompt compacts any."""
        if position > prompt_len:
            return self.thin_spans(prompt_len, position - 1, cached=cached)
        return cached if self.delay_prompt else self.thin_spans(prompt_len, prompt_len, 0, cached)

    def due_position(self, span: int) -> int:
        """First position whose query sees ``span`` thin, if the prompt has ended by then."""
        return (span + 1) * self.span_tokens + self.recent_window

    @property
    def shortest_saving(self) -> int:
        """Tokens, prompt and answer, of the shortest request that gives up a block.

        The last token of an answer is never computed, and at least one is computed after the
        prompt's end by whom a thin span is read.
        """
        spans = 1
        if not self.shrinks:  # then only what is evicted goes
            spans = ENDLESS if self.budget_spans is None else self.budget_spans + 1
        return self.due_position(spans - 1) + 2

    def freeable_spans(self, prompt_len: int, processed_tokens: int, cached: int = 0) -> int:
        """Spans of which the worker reads the thin blocks alone.

        A prompt's spans are free once the step that compacts them has been processed. A span
        that fills while decoding is compacted at the start of the step whose first query sees
        it thin, so the manager waits until that step has been processed: one token later.

        Args:
            prompt_len: Tokens of the prompt.
            processed_tokens: Tokens whose forward pass has finished.
            cached: Spans that came thin from the prefix cache.
        """
        if processed_tokens < prompt_len:
            return max(cached, self.prompt_spans(processed_tokens) if self.prune_prefill else 0)
        if processed_tokens == prompt_len:
            return self.spans_before_decode(prompt_len, prompt_len, cached)
        return self.thin_spans(prompt_len, processed_tokens - 1, cached=cached)

    def next_freeable(self, prompt_len: int, processed_tokens: int, freed: int) -> int:
        """Processed tokens from which on ``freeable_spans`` may be more than ``freed``, at least.

        Args:
            prompt_len: Tokens of the prompt.
            processed_tokens: Those at which ``freed`` spans are freeable.
            freed: Those spans.
        """
        due = self.due_position(freed)
        if processed_tokens < prompt_len:
            return min(prompt_len, due) if self.prune_prefill else prompt_len
        if self.prune_decode or processed_tokens == prompt_len:
            return max(due, prompt_len) + 1 if self.prune_decode else prompt_len + 1
        return sys.maxsize


@dataclass(frozen=True)
class RowLimits:
    """Limits of the rows of a batch, some of which have rules of their own."""

    recent_window: IntArray  # int64 [n]. Most recent tokens of each that stay dense
    budget_spans: IntArray  # int64 [n]. Spans that each one's prompt keeps at most

    @classmethod
    def of(cls, rule: SpanRule, own: Mapping[int, SpanRule], rows: int) -> RowLimits | None:
        """Limits of a batch of ``rows`` rows; None if all are the server's.

        Args:
            rule: The server's.
            own: Rules of the rows that have others.
            rows: How many there are.
        """
        if not own:
            return None
        recent = np.full(rows, rule.recent_window, np.int64)
        budget = np.full(rows, _budget(rule), np.int64)
        for row, other in own.items():
            recent[row], budget[row] = other.recent_window, _budget(other)
        return cls(recent, budget)

    def select(self, which: IntArray) -> RowLimits:
        """Limits of the chosen rows."""
        return RowLimits(self.recent_window[which], self.budget_spans[which])


def _budget(rule: SpanRule) -> int:
    return ENDLESS if rule.budget_spans is None else rule.budget_spans
