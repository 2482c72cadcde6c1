"""Sort one step's batch: see ``step.py`` for the order of work."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from think_vllm.plan.spans import RowLimits, SpanRule
from think_vllm.worker.step import (
    DecodePass,
    Finished,
    Int32Array,
    Int64Array,
    Observation,
    Prefill,
    Step,
    count_up,
)

#: Of vLLM's block tables: a freed entry, or one that was never there.
NULL_BLOCK = 0


@dataclass(frozen=True)
class _Batch:
    """A step's requests; arrays are int64 [n], ``query_start`` [n + 1]."""

    rule: SpanRule
    window: int
    query_start: Int64Array
    computed: Int64Array
    seq_len: Int64Array
    prompt_len: Int64Array
    cached: Int64Array
    own: Mapping[int, SpanRule] = field(default_factory=dict)

    @cached_property
    def limits(self) -> RowLimits | None:
        """Limits of the requests, None if all have the rule's."""
        return RowLimits.of(self.rule, self.own, self.seq_len.size)

    def limits_of(self, which: Int64Array) -> RowLimits | None:
        """Limits of the selected requests, None if all have the rule's."""
        return None if self.limits is None else self.limits.select(which)

    def rule_of(self, request: int) -> SpanRule:
        """A request's rule."""
        return self.own.get(request, self.rule)

    @cached_property
    def selects(self) -> npt.NDArray[np.bool_]:
        """Requests whose prompts select channels: all but those that stay dense."""
        selects = np.ones(self.seq_len.size, np.bool_)
        selects[[row for row, rule in self.own.items() if rule.stays_dense]] = False
        return selects

    @cached_property
    def dense_from(self) -> Int64Array:
        """Spans that a prompt query of each request sees thin."""
        begin = np.zeros_like(self.computed)
        return self.thin_spans(begin, self.computed)

    def thin_spans(self, positions: Int64Array, computed: Int64Array) -> Int64Array:
        """Spans that each request's query at a position sees thin."""
        return self.rule.thin_spans_array(
            self.prompt_len, positions, computed, self.cached, self.limits
        )

    def thin_at(self, ends: Int64Array, which: Int64Array) -> Int64Array:
        """Spans that are thin once the prompts of ``which`` were compacted up to ``ends``."""
        own = self.rule.prompt_spans_array(ends, self.limits_of(which))
        thin: Int64Array = np.maximum(own, self.cached[which])
        return thin

    def is_kept(self, request: int, span: int) -> bool:
        """Whether a due span's channels were kept at the end of its request's prompt."""
        prompt_spans = self.rule_of(request).prompt_spans(int(self.prompt_len[request]))
        cached = int(self.cached[request])
        if prompt_spans <= cached:
            return span == cached
        return self.rule.delay_prompt and span < prompt_spans


def sort_step(
    rule: SpanRule,
    observation_window: int,
    query_start: Int64Array,
    seq_len: Int64Array,
    prompt_len: Int64Array,
    cached: Int64Array | None = None,
    own: Mapping[int, SpanRule] | None = None,
) -> Step:
    """Sort a batch.

    Args:
        rule: When spans are thin.
        observation_window: Last prompt queries that select channels.
        query_start: int64 [n + 1]. Start of each request's queries in the step's tokens.
        seq_len: int64 [n]. Tokens of each request after this step.
        prompt_len: int64 [n]. Tokens of each request's prompt.
        cached: int64 [n]. Leading spans that came thin from the prefix cache; None for none.
        own: Rules of requests that have others, by row.

    Returns:
        The sorted step. Requests without queries in it appear nowhere.
    """
    num_queries = np.diff(query_start)
    computed = seq_len - num_queries
    if cached is None:
        cached = np.zeros_like(computed)
    batch = _Batch(
        rule, observation_window, query_start, computed, seq_len, prompt_len, cached, own or {}
    )
    if np.all(computed >= prompt_len) and np.all(num_queries == 1):
        return Step(None, [], None, None, [_single_pass(batch)])

    in_prompt = np.flatnonzero((computed < prompt_len) & (num_queries > 0))
    prefill = None
    if in_prompt.size:
        prompt_end = np.minimum(seq_len, prompt_len)[in_prompt]
        prefill = Prefill(
            request=in_prompt,
            first_token=query_start[in_prompt],
            num_tokens=prompt_end - computed[in_prompt],
            seq_len=prompt_end,
            thin_spans=batch.dense_from[in_prompt],
        )
    observations = _observe(batch, prefill)
    return Step(
        prefill,
        observations,
        _end_prompts(batch, prefill, observations),
        _end_chunks(batch, prefill) if rule.prune_prefill else None,
        _passes(batch),
    )


def leading_thin_spans(rule: SpanRule, rows: Int32Array, computed: Int64Array) -> Int64Array:
    """Leading spans of requests that came thin from the prefix cache.

    Their tails have been null blocks from the beginning; rows of blocks are only ever appended
    to, so the tails of spans that a request has compacted itself still stand there.

    Args:
        rule: What a span is.
        rows: int32 [n, W]. Blocks of each request.
        computed: int64 [n]. Tokens of each that have been computed, so have blocks.

    Returns:
        int64 [n].
    """
    whole = computed // rule.span_tokens
    found = np.zeros_like(computed)
    last = rule.span_blocks - 1
    if last >= rows.shape[1]:
        return found
    some = np.flatnonzero((rows[:, last] == NULL_BLOCK) & (whole > 0))
    if some.size:
        tails = rows[some, last :: rule.span_blocks] == NULL_BLOCK
        tails &= np.arange(tails.shape[1]) < whole[some, None]
        found[some] = np.logical_and.accumulate(tails, axis=1).sum(axis=1)
    return found


def _observe(batch: _Batch, prefill: Prefill | None) -> list[Observation]:
    """Cut the prompts' observation windows to the step."""
    if prefill is None:
        return []
    found = []
    rows = zip(
        prefill.request, prefill.first_token, prefill.num_tokens, prefill.seq_len, strict=True
    )
    for request, first_token, num_tokens, end in rows:
        start = int(batch.computed[request])
        length = int(batch.prompt_len[request])
        window_start = max(0, length - batch.window)
        if end <= window_start or not batch.selects[request]:
            continue
        observed_from = max(start, window_start)
        found.append(
            Observation(
                request=int(request),
                begin=int(first_token) + observed_from - start,
                end=int(first_token + num_tokens),
                resume_position=start - 1 if start > window_start else None,
                keep_position=int(end) - 1 if end < length else None,
            )
        )
    return found


def _end_prompts(
    batch: _Batch, prefill: Prefill | None, observations: list[Observation]
) -> Finished | None:
    if prefill is None:
        return None
    rule = batch.rule
    ends = prefill.request[prefill.seq_len == batch.prompt_len[prefill.request]]
    ends = ends[batch.selects[ends]]
    if not ends.size:
        return None
    lengths = batch.prompt_len[ends]
    first, last = batch.dense_from[ends], batch.thin_at(lengths, ends)
    later = last > batch.cached[ends]
    # Channels of repacked tokens are selected when they are repacked.
    repacked = rule.evicted_spans_array(lengths, batch.limits_of(ends)) > 0
    return Finished(
        observations=[seen for seen in observations if seen.keep_position is None],
        request=ends,
        num_tokens=lengths,
        first_span=first,
        num_spans=np.zeros_like(first) if rule.delay_prompt else last - first,
        num_observed=np.minimum(lengths, batch.window),
        keeps=np.where(later, rule.delay_prompt & ~repacked, rule.prune_decode),
        repacked=repacked,
    )


def _end_chunks(batch: _Batch, prefill: Prefill | None) -> Finished | None:
    """Chunks of prompts that go on, if spans fell due in them."""
    if prefill is None:
        return None
    first = prefill.thin_spans
    last = batch.thin_at(prefill.seq_len, prefill.request)
    goes_on = prefill.seq_len < batch.prompt_len[prefill.request]
    which = np.flatnonzero(goes_on & (last > first))
    if not which.size:
        return None
    ends = prefill.first_token[which] + prefill.num_tokens[which]
    observed = np.minimum(prefill.num_tokens[which], batch.window)
    return Finished(
        observations=[
            Observation(int(prefill.request[i]), int(end - count), int(end), None, None)
            for i, end, count in zip(which, ends, observed, strict=True)
        ],
        request=prefill.request[which],
        num_tokens=prefill.seq_len[which],
        first_span=first[which],
        num_spans=(last - first)[which],
        num_observed=observed,
        keeps=np.zeros(which.size, np.bool_),
        repacked=np.zeros(which.size, np.bool_),
    )


def _single_pass(batch: _Batch) -> DecodePass:
    """One query per request, all of them past their prompts."""
    rule, position = batch.rule, batch.computed
    thin = batch.thin_spans(position, position)
    earlier = np.maximum(batch.prompt_len, position - 1)
    before = batch.thin_spans(earlier, earlier)
    if rule.delay_prompt:
        before = np.where(position == batch.prompt_len, batch.cached, before)
    count = thin - before
    due = np.repeat(np.arange(count.size), count)
    span = before[due] + count_up(count)
    return DecodePass(
        due_request=due.tolist(),
        due_span=span.tolist(),
        due_kept=[batch.is_kept(*item) for item in zip(due.tolist(), span.tolist(), strict=True)],
        token=batch.query_start[:-1],
        request=np.arange(thin.size),
        seq_len=position + 1,
        thin_spans=thin,
    )


def _passes(batch: _Batch) -> list[DecodePass]:
    parts: list[list[tuple[Int64Array, ...]]] = []
    passes: list[DecodePass] = []
    for request in np.flatnonzero(batch.seq_len > np.maximum(batch.computed, batch.prompt_len)):
        start, length = int(batch.computed[request]), int(batch.prompt_len[request])
        cached, rule = int(batch.cached[request]), batch.rule_of(int(request))
        position = np.arange(max(start, length), int(batch.seq_len[request]))
        lengths = np.full(position.size, length)
        thin = rule.thin_spans_array(lengths, position, lengths, np.full_like(lengths, cached))
        before = rule.spans_before_decode(length, int(position[0]), cached)
        # Past the first, one position makes at most one span due: thin - thin[0] numbers passes.
        number = thin - thin[0]
        for index in range(int(number[-1]) + 1):
            if index == len(passes):
                passes.append(DecodePass())
                parts.append([])
            selected = np.flatnonzero(number == index)
            for span in range(before, int(thin[selected[0]])):
                passes[index].due_request.append(int(request))
                passes[index].due_span.append(span)
                passes[index].due_kept.append(batch.is_kept(int(request), span))
            before = int(thin[selected[0]])
            parts[index].append(
                (
                    batch.query_start[request] + position[selected] - start,
                    np.full(selected.size, request),
                    position[selected] + 1,
                    thin[selected],
                )
            )
    for filled, rows in zip(passes, parts, strict=True):
        filled.token, filled.request, filled.seq_len, filled.thin_spans = (
            np.concatenate(column) for column in zip(*rows, strict=True)
        )
    return passes
