"""A decode step on the CPU, which is built in few operations, is that of any other step."""

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
from think_vllm.hooks.model_runner import StepRows
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.spans import ENDLESS, SpanRule
from think_vllm.worker import metadata_builder as shared
from think_vllm.worker.cpu.builder import ThinkCPUMetadataBuilder
from think_vllm.worker.metadata_builder import ThinkMetadata
from think_vllm.worker.state import GroupState
from think_vllm.worker.step_sorter import leading_thin_spans

PLAN = make_plan(128, torch.bfloat16, 48)
SPAN = PLAN.rule.span_tokens


def make_builder(plan: BlockPlan = PLAN) -> ThinkCPUMetadataBuilder:
    builder = object.__new__(ThinkCPUMetadataBuilder)
    builder.plan, builder.workspace, builder._read_tables = plan, None, set()
    builder.state = GroupState(["layer.0"], 1, 128, plan.kept_channels, 16, torch.device("cpu"))
    builder._every_row = torch.arange(16, dtype=torch.int32)
    for row in range(16):
        builder.state.requests.give(f"r{row}", ())
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
    lens = torch.tensor(seq_len, dtype=torch.int32)
    return SimpleNamespace(
        query_start_loc_cpu=torch.arange(count + 1, dtype=torch.int32),
        seq_lens=lens,
        seq_lens_cpu_upper_bound=lens,
        max_query_len=1,
        max_seq_len=max(seq_len),
        block_table_tensor=table,
    )


def rows_of(metadata: ThinkMetadata) -> Any:
    (decode,) = metadata.tensors.passes
    assert decode.rows is not None
    assert decode.rows.thin_spans is not None
    columns = [decode.rows.request, decode.rows.seq_len, decode.rows.thin_spans]
    due = () if decode.due is None else (decode.due.request.tolist(), decode.due.span.tolist())
    return (
        decode.rows.tokens,
        [c.tolist() for c in columns],
        due,
        decode.repacks,
        decode.repack_slots,
    )


def known_rows(prompt_len: list[int], cached: Any, own: dict[int, SpanRule]) -> StepRows:
    names = [f"r{i}" for i in range(len(prompt_len))]
    return StepRows(names, np.array(prompt_len), np.array(cached), names, own)


def build_both(
    builder: ThinkCPUMetadataBuilder, common: Any, rows: StepRows
) -> tuple[ThinkMetadata, ThinkMetadata]:
    """The step as it is built, and as if it were no decode step; in between, as if one were due."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_runner, "_step_rows", rows)
        short = builder.build(0, common)
        patch.setattr(shared, "steady_spans", lambda *_: None)
        assert rows_of(builder.build(0, common)) == rows_of(short)
        patch.setattr(shared, "_is_decode", lambda *_: False)
        return short, builder.build(0, common)


LENGTHS = st.tuples(st.integers(1, 1500), st.integers(1, 1500), st.integers(0, 4))


@settings(max_examples=200)
@given(requests=st.lists(LENGTHS, min_size=1, max_size=6), dense=st.sets(st.integers(0, 5)))
def test_decode_step_is_built_alike(requests: list[tuple[int, int, int]], dense: set[int]) -> None:
    dense = {row for row in dense if row < len(requests)}
    requests = [(*r[:2], 0) if row in dense else r for row, r in enumerate(requests)]
    prompt_len = [prompt for prompt, _, _ in requests]
    seq_len = [prompt + decoded for prompt, decoded, _ in requests]
    cached = [min(spans, prompt // SPAN) for prompt, _, spans in requests]
    common = decode_step(seq_len, prompt_len, cached)
    computed = np.array(seq_len) - 1
    found = leading_thin_spans(PLAN.rule, common.block_table_tensor.numpy(), computed)
    own = dict.fromkeys(dense, replace(PLAN.rule, recent_window=ENDLESS))
    short, long = build_both(make_builder(), common, known_rows(prompt_len, found, own))
    assert rows_of(short) == rows_of(long)
    (decode,) = short.tensors.passes
    assert decode.rows is not None
    assert decode.rows.thin_spans is not None
    assert all(decode.rows.thin_spans[row] == 0 for row in dense)
    assert (decode.rows.thin_spans >= torch.from_numpy(found)).all()


@settings(max_examples=100)
@given(
    requests=st.lists(LENGTHS, min_size=1, max_size=6),
    ratio=st.sampled_from([0.0, 0.5]),
    budget=st.sampled_from([256, 500]),
    own_spans=st.sampled_from([None, 0, 1, 3]),
)
def test_decode_step_of_evicted_prompts_is_built_alike(requests, ratio, budget, own_spans):
    config = ThinkConfig(kv_channel_prune=ratio, kv_evict="snapkv", kv_evict_budget=budget)
    plan = plan_blocks(config, 128, 2)
    assert plan is not None
    rule = plan.rule
    prompt_len = [prompt for prompt, _, _ in requests]
    seq_len = [prompt + decoded for prompt, decoded, _ in requests]
    none = [0] * len(requests)
    common = decode_step(seq_len, prompt_len, none, width=3000 // plan.block_size + 1)
    # The first has a budget of its own, or stays dense.
    others = {0: replace(rule, recent_window=ENDLESS, budget_spans=None)}
    if own_spans:
        others = {0: replace(rule, budget_spans=own_spans)}
    own = {} if own_spans is None else others
    short, long = build_both(make_builder(plan), common, known_rows(prompt_len, none, own))
    assert rows_of(short) == rows_of(long)
    assert torch.equal(short.decode_table, long.decode_table)
    (decode,) = short.tensors.passes
    assert decode.rows is not None
    rows = zip(decode.rows.request, decode.rows.seq_len, seq_len, prompt_len, strict=True)
    for i, (entry, seen, length, prompt) in enumerate(rows):
        evicted = own.get(i, rule).evicted_spans(prompt)
        assert seen == length - evicted * rule.span_tokens
        first = common.block_table_tensor[i, evicted * rule.span_blocks]
        assert short.decode_table[entry, 0] == first
