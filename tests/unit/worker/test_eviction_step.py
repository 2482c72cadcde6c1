"""What eviction does in which step, against a request followed chunk by chunk."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from think_vllm.plan.spans import RowLimits, SpanRule
from think_vllm.worker.eviction_step import find_accumulations, take_repacks
from think_vllm.worker.step_sorter import sort_step

WINDOW = 5
RULES = st.builds(
    SpanRule,
    block_size=st.just(2),
    span_blocks=st.just(3),
    thin_blocks=st.just(2),
    recent_window=st.integers(0, 6),
    prune_decode=st.booleans(),
    delay_prompt=st.just(True),
    budget_spans=st.integers(1, 3),
)


@settings(max_examples=300)
@given(
    data=st.data(), rule=RULES, length=st.integers(1, 60), window=st.sampled_from([WINDOW, None])
)
def test_each_query_is_watched_once_and_each_prompt_packed_once(data, rule, length, window):
    computed, total, thin = 0, length + 30, 0
    seen: list[int] = []
    repacked = 0
    # The request may have a budget of its own.
    own = replace(rule, budget_spans=data.draw(st.sampled_from([None, 1, 2, 5, rule.budget_spans])))
    evicted = own.evicted_spans(length)
    while computed < total:
        count = min(data.draw(st.sampled_from([1, 1, 2, 7, 30])), total - computed)
        # The request is the second row of a batch; the first one decodes.
        starts, lens = np.array([0, 1, 1 + count]), np.array([9, computed + count])
        prompts = np.array([3, length])
        step = sort_step(rule, WINDOW, starts, lens, prompts, own={1: own})
        empty = rule.evicted_spans_array(prompts, RowLimits.of(rule, {1: own}, 2))
        assert empty.tolist() == [0, evicted]
        accumulations = find_accumulations(
            rule, window, step.prefill, prompts, empty, ["other", "one"]
        )
        for item in accumulations:
            assert (item.request, item.row, item.prompt_len) == ("one", 1, length)
            assert item.kept_spans == own.budget_spans
            assert item.starts == (not seen)
            assert item.begin - 1 == item.position - computed
            seen += range(item.position, item.position + item.end - item.begin)
            assert item.ends == (seen[-1] == length - 1)
        for decode in step.passes:
            before = [
                span for row, span in zip(decode.due_request, decode.due_span, strict=True) if row
            ]
            repacks = take_repacks(rule, decode, prompts, empty, ["other", "one"])
            after = [
                span for row, span in zip(decode.due_request, decode.due_span, strict=True) if row
            ]
            if repacks:
                (repack,) = repacks
                assert (repack.request, repack.row, repack.prompt_len) == ("one", 1, length)
                assert (repack.first_span, repack.num_spans) == (evicted, own.budget_spans)
                assert thin == 0
                assert before == [*range(evicted + repack.num_spans), *after]
                thin, repacked = evicted + repack.num_spans, repacked + 1
            else:
                assert before == after
            assert after == list(range(thin, thin + len(after)))
            thin += len(after)
            of_request = decode.request == 1
            assert (decode.thin_spans[of_request] == thin).all()
        computed += count
    assert repacked == (evicted > 0)
    chosen = 0 if window is None else max(0, length - window)
    assert seen == (list(range(chosen, length)) if evicted else [])


@given(rule=RULES, length=st.integers(1, 60))
def test_prompts_that_end_keep_no_channels_for_tokens_yet_to_be_packed(rule, length):
    def ends(rule: SpanRule) -> bool:
        step = sort_step(
            rule, WINDOW, np.array([0, length]), np.array([length]), np.array([length])
        )
        assert step.finished_prompts is not None
        return bool(step.finished_prompts.keeps[0])

    assert ends(rule) == (ends(replace(rule, budget_spans=None)) and not rule.evicted_spans(length))
