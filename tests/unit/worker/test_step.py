"""Sorting a step, against a request followed token by token."""

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from think_vllm.plan.spans import ENDLESS, SpanRule
from think_vllm.worker.step import Finished, Step
from think_vllm.worker.step_sorter import leading_thin_spans, sort_step

WINDOW = 5


@dataclass
class Follower:
    """A worker's memory of one request: what is thin, and what was observed."""

    rule: SpanRule
    prompt_len: int
    cached: int = 0
    thin: int = 0
    ended: bool = False
    kept: bool = False
    observed: list[int] = field(default_factory=list)
    kept_at: int | None = None
    answered: list[int] = field(default_factory=list)
    seen_thin: list[int] = field(default_factory=list)


def run(step: Step, rows: list[Follower], start: list[int], computed: list[int]) -> None:
    """Do what a forward pass does, and check that each query sees what it should."""
    if step.prefill is not None:
        for request, first, count, seq_len, thin in zip(
            step.prefill.request,
            step.prefill.first_token,
            step.prefill.num_tokens,
            step.prefill.seq_len,
            step.prefill.thin_spans,
            strict=True,
        ):
            row = rows[request]
            begin = computed[request] + int(first) - start[request]
            assert begin + count == seq_len <= row.prompt_len
            assert (
                row.thin
                == thin
                == row.rule.thin_spans(row.prompt_len, begin, computed[request], row.cached)
            )
            row.answered += range(begin, int(seq_len))
            row.seen_thin += [row.thin] * int(count)
    for seen in step.observations:
        row = rows[seen.request]
        assert not row.rule.stays_dense
        assert seen.resume_position == row.kept_at
        if seen.resume_position is None:
            row.observed = []
        offset = computed[seen.request] - start[seen.request]
        row.observed += range(seen.begin + offset, seen.end + offset)
        row.kept_at = seen.keep_position
    for ends in (step.finished_prompts, step.finished_chunks):
        if ends is not None:
            compact_finished(ends, rows, start, computed)
    for decode in step.passes:
        for request, span, kept in zip(
            decode.due_request, decode.due_span, decode.due_kept, strict=True
        ):
            row = rows[request]
            assert span == row.thin
            # Channels are where the worker looks for them.
            assert row.kept if kept else span > 0
            row.thin += 1
        for token, request, seq_len, thin in zip(
            decode.token, decode.request, decode.seq_len, decode.thin_spans, strict=True
        ):
            row = rows[request]
            position = computed[request] + int(token) - start[request]
            assert seq_len == position + 1
            assert row.ended or row.rule.stays_dense
            assert (
                thin == row.thin == row.rule.thin_spans(row.prompt_len, position, cached=row.cached)
            )
            row.answered.append(position)
            row.seen_thin.append(int(thin))


def compact_finished(
    ends: Finished, rows: list[Follower], start: list[int], computed: list[int]
) -> None:
    assert [seen.request for seen in ends.observations] == list(ends.request)
    which, spans = ends.spans()
    for i, (request, end, first, observed) in enumerate(
        zip(ends.request, ends.num_tokens, ends.first_span, ends.num_observed, strict=True)
    ):
        row, seen = rows[request], ends.observations[i]
        assert not row.rule.stays_dense
        begin = seen.begin + computed[request] - start[request]
        if end == row.prompt_len:
            assert row.observed == list(range(max(0, end - WINDOW), end))
            assert len(row.observed) == observed
            row.ended, row.kept = True, bool(ends.keeps[i])
        else:
            assert begin + observed == end
            assert observed == min(WINDOW, end - computed[request])
        assert spans[which == i].tolist() == list(range(first, first + ends.num_spans[i]))
        assert row.thin == first
        row.thin += int(ends.num_spans[i])


RULES = st.builds(
    SpanRule,
    block_size=st.just(2),
    span_blocks=st.just(3),
    thin_blocks=st.just(2),
    recent_window=st.integers(0, 6),
    prune_decode=st.booleans(),
    prune_prefill=st.booleans(),
    delay_prompt=st.booleans(),
).filter(lambda rule: not (rule.prune_prefill and rule.delay_prompt))


@settings(max_examples=300)
@given(data=st.data(), rule=RULES)
def test_sort_step_follows_every_request(data: st.DataObject, rule: SpanRule) -> None:
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    # A hit leaves the observation window to be computed.
    cached = [
        data.draw(st.integers(0, max(0, length - WINDOW) // rule.span_tokens)) for length in prompts
    ]
    own = {}
    if not rule.prune_prefill:
        # Some stay dense, and hit nothing thin.
        dense = replace(rule, recent_window=ENDLESS)
        own = {row: dense for row in range(len(prompts)) if data.draw(st.integers(0, 2)) == 0}
        cached = [0 if row in own else hit for row, hit in enumerate(cached)]
    rows = [
        Follower(own.get(row, rule), length, hit, hit)
        for row, (length, hit) in enumerate(zip(prompts, cached, strict=True))
    ]
    computed = [hit * rule.span_tokens for hit in cached]
    begun = list(computed)
    for _ in range(data.draw(st.integers(1, 12))):
        # Chunks may cross the end of the prompt, as those of resumed requests do.
        counts = [data.draw(st.sampled_from([0, 1, 1, 2, 7, 30])) for _ in rows]
        start = [0, *np.cumsum(counts).tolist()]
        step = sort_step(
            rule,
            WINDOW,
            np.array(start),
            np.array([c + n for c, n in zip(computed, counts, strict=True)]),
            np.array(prompts),
            np.array(cached),
            own,
        )
        run(step, rows, start, computed)
        computed = [c + n for c, n in zip(computed, counts, strict=True)]
        for row, count, first in zip(rows, computed, begun, strict=True):
            assert sorted(row.answered) == list(range(first, count))


@settings(max_examples=100)
@given(data=st.data(), rule=RULES.filter(lambda rule: not rule.prune_prefill))
def test_sort_step_chunks_do_not_change_what_queries_see(data, rule):
    length, total = data.draw(st.integers(1, 40)), 80
    seen = []
    for _ in range(2):
        row, computed = Follower(rule, length), 0
        while computed < total:
            count = min(data.draw(st.sampled_from([1, 2, 7, 30])), total - computed)
            step = sort_step(
                rule, WINDOW, np.array([0, count]), np.array([computed + count]), np.array([length])
            )
            run(step, [row], [0], [computed])
            computed += count
        order = np.argsort(row.answered)
        seen.append(np.array(row.seen_thin)[order].tolist())
    assert seen[0] == seen[1]


def test_leading_thin_spans_counts_null_tails_from_the_beginning() -> None:
    rule = SpanRule(2, 3, 2, 5, True)  # 3 blocks of 2 tokens
    rows = np.array(
        [
            [5, 6, 0, 7, 8, 0, 1, 2, 3],  # two thin spans, one dense
            [5, 6, 7, 8, 9, 0, 0, 0, 0],  # dense; the rest has no blocks yet
            [5, 6, 0, 7, 8, 9, 1, 2, 0],  # one thin span
            [5, 6, 0, 7, 0, 0, 0, 0, 0],  # one thin span; the second is not computed yet
        ],
        np.int32,
    )
    computed = np.array([17, 10, 18, 8])
    assert leading_thin_spans(rule, rows, computed).tolist() == [2, 0, 1, 1]
    assert leading_thin_spans(rule, rows[:, :2], computed).tolist() == [0] * 4


def test_sort_step_decode_batch_is_one_pass_in_batch_order() -> None:
    rule = SpanRule(48, 4, 3, 32, True)
    step = sort_step(
        rule, 32, np.arange(4), np.array([225, 300, 1000]), np.array([100, 300 - 1, 100])
    )
    assert step.prefill is None
    assert step.finished_prompts is None
    (decode,) = step.passes
    assert decode.token.tolist() == [0, 1, 2]
    assert decode.seq_len.tolist() == [225, 300, 1000]
    assert decode.thin_spans.tolist() == [1, 1, 5]
    # The first request's span 0 became due just now; the others' spans were due before.
    assert (decode.due_request, decode.due_span) == ([0], [0])


@pytest.mark.parametrize("prune_decode", [True, False])
def test_sort_step_resumed_request_repeats_its_passes(prune_decode: bool) -> None:
    rule = SpanRule(48, 4, 3, 32, prune_decode)
    step = sort_step(rule, 32, np.array([0, 700]), np.array([700]), np.array([300]))
    thin = [decode.thin_spans.tolist()[0] for decode in step.passes]
    due = [decode.due_span for decode in step.passes]
    # 300 - 32 holds one span; the next ones fall due at 2 * 192 + 32 and 3 * 192 + 32.
    assert thin == ([1, 2, 3] if prune_decode else [1])
    assert due == ([[], [1], [2]] if prune_decode else [[]])


def ends_of(prompts: list[int], first_spans: list[int], rule: SpanRule) -> Finished:
    """Prompts that end, of which some spans came thin."""
    lengths, first = np.array(prompts), np.array(first_spans)
    spans = np.maximum(0, lengths - rule.recent_window) // rule.span_tokens
    compacted = np.zeros_like(first) if rule.delay_prompt else np.maximum(0, spans - first)
    every = np.arange(lengths.size)
    return Finished(
        [], every, lengths, first, compacted, np.minimum(lengths, 5), every >= 0, every < 0
    )


@pytest.mark.parametrize("delayed", [False, True])
def test_choices_of_spans_and_of_whole_prompts(delayed: bool) -> None:
    # Spans of 12 tokens in 3 blocks, behind a recent window of 4.
    rule = SpanRule(4, 3, 2, 4, True, delay_prompt=delayed)
    # Three spans; none; two, one of which came thin; one that came thin.
    ends = ends_of([43, 15, 28, 16], [0, 0, 1, 1], rule)
    found = ends.selections(rule, per_span=True)
    assert found.end.tolist() == [0, 0, 0, 1, 2, 3]
    assert found.first_block.tolist() == [0, 3, 6, 0, 3, 3]
    assert found.num_tokens.tolist() == [12, 24, 36, 15, 24, 16]
    assert found.begin.tolist() == [0, 3, 4, 5]
    assert found.count.tolist() == [3, 1, 1, 1]
    # Spans that this step compacts, of both prompts that have any.
    assert found.of_span.tolist() == ([] if delayed else [0, 1, 2, 4])
    whole = ends.selections(rule, per_span=False)
    assert whole.end.tolist() == whole.begin.tolist() == [0, 1, 2, 3]
    assert whole.first_block.tolist() == [0, 0, 3, 3]
    assert whole.num_tokens.tolist() == [43, 15, 28, 16]
    assert whole.count.tolist() == [1, 1, 1, 1]
    assert whole.of_span.tolist() == ([] if delayed else [0, 0, 0, 2])
