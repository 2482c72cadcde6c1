"""The rule that scheduler and workers share, against a simulation of single tokens."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from think_vllm.plan.spans import ENDLESS, RowLimits, SpanRule

RULES = st.builds(
    SpanRule,
    block_size=st.sampled_from([2, 4]),
    span_blocks=st.integers(2, 4),
    thin_blocks=st.just(1),
    recent_window=st.integers(0, 9),
    prune_decode=st.booleans(),
    prune_prefill=st.booleans(),
    delay_prompt=st.booleans(),
    budget_spans=st.sampled_from([None, 1, 2]),
)


def simulate(rule: SpanRule, prompt_len: int, position: int) -> int:
    """Thin spans that a query sees, by following a request token by token."""
    if position < prompt_len:
        return 0
    thin = 0
    for now in range(prompt_len, (position if rule.prune_decode else prompt_len) + 1):
        while (thin + 1) * rule.span_tokens + rule.recent_window <= now:
            thin += 1
    return thin


@given(
    rule=RULES,
    prompt_len=st.integers(1, 60),
    position=st.integers(0, 120),
    computed=st.integers(0, 60),
    cached=st.integers(0, 4),
)
def test_thin_spans_equals_token_by_token(rule, prompt_len, position, computed, cached):
    expected = simulate(rule, prompt_len, position)
    if rule.prune_prefill and position < prompt_len:
        expected = simulate(replace(rule, prune_decode=True), 0, computed)
    expected = max(expected, cached)
    assert rule.thin_spans(prompt_len, position, computed, cached) == expected
    arrays = (np.array([x] * 2) for x in (prompt_len, position, computed, cached))
    assert rule.thin_spans_array(*arrays).tolist() == [expected] * 2


@given(
    rule=RULES,
    prompt_len=st.integers(1, 60),
    processed=st.integers(0, 120),
    cached=st.integers(0, 4),
)
def test_freeable_spans_were_thin_for_a_processed_query_or_at_an_end(
    rule: SpanRule, prompt_len: int, processed: int, cached: int
) -> None:
    if processed < prompt_len:
        expected = rule.prompt_spans(processed) if rule.prune_prefill else 0
    elif processed == prompt_len:
        expected = 0 if rule.delay_prompt else rule.prompt_spans(prompt_len)
    else:
        expected = simulate(rule, prompt_len, processed - 1)
    assert rule.freeable_spans(prompt_len, processed, cached) == max(cached, expected)


@given(rule=RULES, thin_blocks=st.sampled_from([1, 4]), longest=st.integers(2, 40))
def test_shortest_saving_equals_looking_at_every_request(rule, thin_blocks, longest):
    rule = replace(rule, thin_blocks=thin_blocks, span_blocks=max(thin_blocks, rule.span_blocks))
    saves = False
    for prompt_len in range(1, longest):
        last = longest - 2  # the last token of an answer is never computed
        for position in range(prompt_len, last + 1):
            thin = rule.thin_spans(prompt_len, position, computed=prompt_len)
            gone = rule.evicted_spans(prompt_len) if thin else 0
            saves |= gone > 0 or (rule.shrinks and thin > 0)
    assert (rule.shortest_saving <= longest) is saves


def test_prompt_spans_leaves_the_recent_window_dense() -> None:
    rule = SpanRule(48, 4, 3, 32, True)
    assert [rule.prompt_spans(n) for n in (1, 223, 224, 225, 415, 416)] == [0, 0, 1, 1, 1, 2]


@given(rule=RULES, prompt_len=st.integers(1, 60), cached=st.integers(0, 4))
def test_nothing_is_freeable_before_next_freeable(rule, prompt_len, cached):
    for processed in range(120):
        freed = rule.freeable_spans(prompt_len, processed, cached)
        following = rule.next_freeable(prompt_len, processed, freed)
        assert following > processed
        for later in range(processed, min(following, 121)):
            assert rule.freeable_spans(prompt_len, later, cached) == freed


@given(rule=RULES, prompt_len=st.integers(1, 60))
def test_exact_tokens_have_seen_no_thin_span(rule: SpanRule, prompt_len: int) -> None:
    seen = [rule.thin_spans(prompt_len, p, computed=p) > 0 for p in range(200)]
    exact = rule.exact_tokens(prompt_len)
    if rule.prune_prefill:
        assert exact == 0
    else:
        assert min(exact, 200) == next((p for p in range(200) if seen[p]), 200)


def test_due_position_is_the_first_that_sees_the_span_thin() -> None:
    rule = SpanRule(48, 4, 3, 32, True)
    assert rule.due_position(0) == 224
    assert [rule.thin_spans(100, p) for p in (223, 224, 415, 416)] == [0, 1, 1, 2]


@given(rule=RULES, prompt_len=st.integers(1, 60))
def test_evicted_spans_leaves_the_budget(rule: SpanRule, prompt_len: int) -> None:
    evicted = rule.evicted_spans(prompt_len)
    spans = rule.prompt_spans(prompt_len)
    assert spans - evicted == (
        spans if rule.budget_spans is None else min(spans, rule.budget_spans)
    )
    assert rule.evicted_spans_array(np.array([prompt_len] * 2)).tolist() == [evicted] * 2


@given(rule=RULES, rows=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 300)), min_size=1))
def test_rows_with_rules_of_their_own(rule: SpanRule, rows: list[tuple[int, int]]) -> None:
    others = [
        rule,
        replace(rule, budget_spans=None if rule.budget_spans is None else 3),
        replace(rule, recent_window=ENDLESS, budget_spans=None),
    ]
    own = {row: others[row % 3] for row in range(len(rows)) if row % 3}
    limits = RowLimits.of(rule, own, len(rows))
    assert (limits is None) == (len(rows) == 1)
    prompts, positions = (np.array(column) for column in zip(*rows, strict=True))
    none = np.zeros_like(prompts)
    thin = rule.thin_spans_array(prompts, positions, none, none, limits)
    evicted = rule.evicted_spans_array(prompts, limits)
    for row, (prompt_len, position) in enumerate(rows):
        assert thin[row] == others[row % 3].thin_spans(prompt_len, position)
        assert evicted[row] == others[row % 3].evicted_spans(prompt_len)
