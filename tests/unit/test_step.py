"""Sorting a step, against a request followed token by token."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from think_vllm.attention.step import Step, sort_step
from think_vllm.spans import SpanRule

WINDOW = 5


@dataclass
class Follower:
    """A worker's memory of one request: what is thin, and what was observed."""

    rule: SpanRule
    prompt_len: int
    thin: int = 0
    ended: bool = False
    observed: list[int] = field(default_factory=list)
    kept_at: int | None = None
    answered: list[int] = field(default_factory=list)


def run(step: Step, rows: list[Follower], start: list[int], computed: list[int]) -> None:
    """Do what a forward pass does, and check that each query sees what it should."""
    if step.prefill is not None:
        for request, first, count, seq_len in zip(
            step.prefill.request,
            step.prefill.first_token,
            step.prefill.num_tokens,
            step.prefill.seq_len,
            strict=True,
        ):
            row = rows[request]
            begin = computed[request] + int(first) - start[request]
            assert begin + count == seq_len <= row.prompt_len
            assert row.thin == 0
            row.answered += range(begin, int(seq_len))
    for seen in step.observations:
        row = rows[seen.request]
        assert seen.resume_position == row.kept_at
        if seen.resume_position is None:
            row.observed = []
        offset = computed[seen.request] - start[seen.request]
        row.observed += range(seen.begin + offset, seen.end + offset)
        row.kept_at = seen.keep_position
    if step.prompt_ends is not None:
        ends = step.prompt_ends
        assert [s.request for s in step.observations if s.keep_position is None] == list(
            ends.request
        )
        for request, length, spans, observed in zip(
            ends.request, ends.prompt_len, ends.num_spans, ends.num_observed, strict=True
        ):
            row = rows[request]
            assert length == row.prompt_len
            assert row.observed == list(range(max(0, length - WINDOW), length))
            assert len(row.observed) == observed
            row.thin, row.ended = int(spans), True
    for wave in step.waves:
        for request, span in zip(wave.due_request, wave.due_span, strict=True):
            assert span == rows[request].thin
            rows[request].thin += 1
        for token, request, seq_len, thin in zip(
            wave.token, wave.request, wave.seq_len, wave.thin_spans, strict=True
        ):
            row = rows[request]
            position = computed[request] + int(token) - start[request]
            assert seq_len == position + 1
            assert row.ended
            assert thin == row.thin == row.rule.thin_spans(row.prompt_len, position)
            row.answered.append(position)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), prune_decode=st.booleans(), recent=st.integers(0, 6))
def test_sort_step_follows_every_request(
    data: st.DataObject, prune_decode: bool, recent: int
) -> None:
    rule = SpanRule(2, 3, 2, recent, prune_decode)
    prompts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    rows = [Follower(rule, length) for length in prompts]
    computed = [0] * len(rows)
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
        )
        run(step, rows, start, computed)
        computed = [c + n for c, n in zip(computed, counts, strict=True)]
        for row, count in zip(rows, computed, strict=True):
            assert sorted(row.answered) == list(range(count))


def test_sort_step_decode_batch_is_one_wave_in_batch_order() -> None:
    rule = SpanRule(48, 4, 3, 32, True)
    step = sort_step(
        rule, 32, np.arange(4), np.array([225, 300, 1000]), np.array([100, 300 - 1, 100])
    )
    assert step.prefill is None
    assert step.prompt_ends is None
    (wave,) = step.waves
    assert wave.token.tolist() == [0, 1, 2]
    assert wave.seq_len.tolist() == [225, 300, 1000]
    assert wave.thin_spans.tolist() == [1, 1, 5]
    # The first request's span 0 became due just now; the others' spans were due before.
    assert (wave.due_request, wave.due_span) == ([0], [0])


@pytest.mark.parametrize("prune_decode", [True, False])
def test_sort_step_resumed_request_repeats_its_waves(prune_decode: bool) -> None:
    rule = SpanRule(48, 4, 3, 32, prune_decode)
    step = sort_step(rule, 32, np.array([0, 700]), np.array([700]), np.array([300]))
    thin = [wave.thin_spans.tolist()[0] for wave in step.waves]
    due = [wave.due_span for wave in step.waves]
    # 300 - 32 holds one span; the next ones fall due at 2 * 192 + 32 and 3 * 192 + 32.
    assert thin == ([1, 2, 3] if prune_decode else [1])
    assert due == ([[], [1], [2]] if prune_decode else [[]])
