"""The short way to a decode step is the long way's result."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import make_plan
from think_vllm.hooks import model_runner
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.spans import ENDLESS, SpanRule
from think_vllm.worker.cpu.builder import ThinkCPUMetadataBuilder
from think_vllm.worker.cpu.metadata import ThinkCPUMetadata

PLAN = make_plan(128, torch.bfloat16, 48)
SPAN = PLAN.rule.span_tokens
RECENT = PLAN.rule.recent_window


def make_builder(plan: BlockPlan = PLAN) -> ThinkCPUMetadataBuilder:
    builder = object.__new__(ThinkCPUMetadataBuilder)
    builder.plan, builder.thin, builder._scratch = plan, True, None
    builder._every_row = np.arange(16, dtype=np.int32)
    builder._no_spans = np.zeros(16, np.int32)
    builder._may_hit_thin = True
    return builder


def decode_step(
    seq_len: list[int], prompt_len: list[int], cached: list[int], width: int = 80
) -> Any:
    count = len(seq_len)
    table = torch.arange(1, 1 + count * width, dtype=torch.int32).view(count, width)
    for row, spans in enumerate(cached):
        for span in range(spans):
            table[
                row, span * PLAN.span_blocks + PLAN.thin_blocks : (span + 1) * PLAN.span_blocks
            ] = 0
    return SimpleNamespace(
        max_query_len=1,
        query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=torch.tensor(seq_len, dtype=torch.int32),
        rswa_prefix_lens=torch.tensor(prompt_len, dtype=torch.int32),
        block_table_tensor=table,
    )


def rows_of(metadata: ThinkCPUMetadata) -> Any:
    (wave,) = metadata.waves
    queries = wave.queries
    columns = [queries.rows.request, queries.rows.seq_len, queries.rows.thin_spans]
    return queries.tokens, [c.tolist() for c in columns], wave.due_span.tolist()


LENGTHS = st.tuples(st.integers(1, 1500), st.integers(1, 1500), st.integers(0, 4))


def known_rows(
    prompt_len: list[int], own: dict[int, SpanRule] | None = None
) -> model_runner.StepRows:
    names = [f"r{i}" for i in range(len(prompt_len))]
    none = np.zeros(len(names), np.int64)
    return model_runner.StepRows(names, np.array(prompt_len), none, names, own or {})


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=6),
    dense=st.sets(st.integers(0, 5)),
)
def test_decode_step_is_built_alike(requests: list[tuple[int, int, int]], dense: set[int]) -> None:
    dense = {row for row in dense if row < len(requests)}
    requests = [(*r[:2], 0) if row in dense else r for row, r in enumerate(requests)]
    prompt_len = [prompt for prompt, _, _ in requests]
    seq_len = [prompt + decoded for prompt, decoded, _ in requests]
    cached = [min(spans, prompt // SPAN) for prompt, _, spans in requests]
    common = decode_step(seq_len, prompt_len, cached)
    builder = make_builder()
    own = dict.fromkeys(dense, replace(PLAN.rule, recent_window=ENDLESS))
    with pytest.MonkeyPatch.context() as patch:
        if dense:
            patch.setattr(model_runner, "_step_rows", known_rows(prompt_len, own))
        short = builder._build_decode(common)
        common.max_query_len = 2  # not what it is, but the long way does not look
        long = builder.build(0, common)
    assert all(long.waves[0].queries.rows.thin_spans[row] == 0 for row in dense)
    if short is None:
        windows = [ENDLESS if row in dense else RECENT for row in range(len(requests))]
        assert any((n - 1 - w) % SPAN == 0 for n, w in zip(seq_len, windows, strict=True))
    else:
        assert rows_of(short) == rows_of(long)
        assert short.step.prefill is None
        assert long.context is None


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=6),
    ratio=st.sampled_from([0.0, 0.5]),
    budget=st.sampled_from([256, 500]),
    own_spans=st.sampled_from([None, 0, 1, 3]),
)
def test_decode_step_of_evicted_prompts_is_built_alike(
    requests: list[tuple[int, int, int]], ratio: float, budget: int, own_spans: int | None
) -> None:
    config = ThinkConfig(kv_channel_prune=ratio, kv_evict="snapkv", kv_evict_budget=budget)
    plan = plan_blocks(config, 128, 2)
    assert plan is not None
    rule = plan.rule
    prompt_len = [prompt for prompt, _, _ in requests]
    # The first query past a prompt comes with the packing.
    seq_len = [prompt + 1 + decoded for prompt, decoded, _ in requests]
    common = decode_step(
        seq_len, prompt_len, [0] * len(requests), width=3000 // plan.block_size + 1
    )
    builder = make_builder(plan)
    builder._may_hit_thin = False
    # The first has a budget of its own, or stays dense.
    others = {0: replace(rule, recent_window=ENDLESS, budget_spans=None)}
    if own_spans:
        others = {0: replace(rule, budget_spans=own_spans)}
    known = known_rows(prompt_len, {} if own_spans is None else others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "_step_rows", known)
        short = builder._build_decode(common)
        common.max_query_len = 2
        long = builder.build(0, common)
    rules = [known.own.get(row, rule) for row in range(len(requests))]
    due = [
        (n - 1 - own.recent_window) % rule.span_tokens == 0
        for n, own in zip(seq_len, rules, strict=True)
    ]
    if short is None:
        assert any(due)
        assert rule.prune_decode
        return
    assert rows_of(short) == rows_of(long)
    table = short.wave_table
    assert torch.equal(table, long.wave_table)
    (wave,) = short.waves
    rows = zip(
        wave.queries.rows.request, wave.queries.rows.seq_len, seq_len, prompt_len, strict=True
    )
    for i, (entry, seen, length, prompt) in enumerate(rows):
        evicted = rules[i].evicted_spans(prompt)
        assert seen == length - evicted * rule.span_tokens
        first = common.block_table_tensor[i, evicted * rule.span_blocks]
        assert table[entry, 0] == first


@pytest.mark.parametrize("decoded", [0, -5])
def test_prompts_do_not_take_the_short_way(decoded: int) -> None:
    assert (
        make_builder()._build_decode(decode_step([300, 400 + decoded], [100, 400], [0, 0])) is None
    )
