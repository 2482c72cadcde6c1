"""The short way to a decode step is the long way's result."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.helpers import make_plan
from think_vllm.attention.cpu_builder import ThinkCPUMetadata, ThinkCPUMetadataBuilder

PLAN = make_plan(128, torch.bfloat16, 48)
SPAN = PLAN.rule.span_tokens
RECENT = PLAN.rule.recent_window


def make_builder() -> ThinkCPUMetadataBuilder:
    builder = object.__new__(ThinkCPUMetadataBuilder)
    builder.plan, builder.thin, builder._scratch = PLAN, True, None
    builder._every_row = np.arange(16, dtype=np.int32)
    builder._no_spans = np.zeros(16, np.int32)
    builder._may_hit_thin = True
    return builder


def decode_step(seq_len: list[int], prompt_len: list[int], cached: list[int]) -> Any:
    count = len(seq_len)
    table = torch.arange(1, 1 + count * 80, dtype=torch.int32).view(count, 80)
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


@settings(max_examples=200, deadline=None)
@given(requests=st.lists(LENGTHS, min_size=1, max_size=6))
def test_decode_step_is_built_alike(requests: list[tuple[int, int, int]]) -> None:
    prompt_len = [prompt for prompt, _, _ in requests]
    seq_len = [prompt + decoded for prompt, decoded, _ in requests]
    cached = [min(spans, prompt // SPAN) for prompt, _, spans in requests]
    common = decode_step(seq_len, prompt_len, cached)
    builder = make_builder()
    short = builder._build_decode(common)
    common.max_query_len = 2  # not what it is, but the long way does not look
    long = builder.build(0, common)
    if short is None:
        assert any((n - 1 - RECENT) % SPAN == 0 for n in seq_len)
    else:
        assert rows_of(short) == rows_of(long)
        assert short.step.prefill is None
        assert long.context is None


@pytest.mark.parametrize("decoded", [0, -5])
def test_prompts_do_not_take_the_short_way(decoded: int) -> None:
    assert (
        make_builder()._build_decode(decode_step([300, 400 + decoded], [100, 400], [0, 0])) is None
    )
