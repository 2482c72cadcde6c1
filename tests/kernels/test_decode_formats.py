"""Decode attention over every format of thin blocks, against the reference."""

import numpy as np
import pytest
import torch

from tests.kernels.helpers import FORMATS, make_case, make_plan
from tests.kernels.test_decode import check, contexts_of, run
from think_vllm.kernels.reference.compaction import thin_run, write_thin
from think_vllm.plan.formats import Encoding
from think_vllm.plan.matrix_layout import MatrixLayout

QUANTIZED = [made for made in FORMATS if made[0] != "none"]
formats = pytest.mark.parametrize(("quant", "ratio"), QUANTIZED)


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
def test_decode_head_size(dtype, head_size, quant, ratio):
    plan = make_plan(head_size, dtype, None, ratio, quant)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@formats
def test_decode_of_biased_keys(quant, ratio):
    plan = make_plan(64, torch.float32, None, ratio, quant)
    check(make_case(plan, torch.float32, 4, 2, contexts_of(plan), key_bias=10.0))


@pytest.mark.parametrize("quant", ["fp8", "k4v2"])
def test_decode_float16(quant):
    plan = make_plan(64, torch.float16, None, 0.5, quant)
    check(make_case(plan, torch.float16, 4, 2, contexts_of(plan)))


def test_decode_fp8_head_that_is_no_multiple_of_32():
    plan = make_plan(80, torch.float32, None, 0.5, "fp8")
    check(make_case(plan, torch.float32, 4, 2, contexts_of(plan)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("quant", ["fp8", "k4v2"])
def test_decode_group_size(num_heads, num_kv_heads, quant):
    plan = make_plan(64, torch.float32, None, 0.5, quant)
    check(make_case(plan, torch.float32, num_heads, num_kv_heads, contexts_of(plan)))


@formats
@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 80, 96, 112, 128])
def test_decode_block_size(block_size, quant, ratio):
    plan = make_plan(64, torch.float32, block_size, ratio, quant)
    check(make_case(plan, torch.float32, 4, 1, contexts_of(plan)))


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize("quant", ["kivi4", "k4v2", "kivi2"])
@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_decode_quant_group(group, quant, ratio):
    plan = make_plan(128, torch.float32, None, ratio, quant, group)
    check(make_case(plan, torch.float32, 4, 2, contexts_of(plan)))


@formats
def test_decode_random_contexts(quant, ratio):
    plan = make_plan(64, torch.float32, None, ratio, quant)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        contexts = []
        for _ in range(4):
            thin_spans = int(rng.integers(0, 12))
            tail = int(rng.integers(1, 3 * plan.span_tokens))
            contexts.append((thin_spans * plan.span_tokens + tail, thin_spans))
        check(make_case(plan, torch.float32, 4, 2, contexts, seed))


@formats
def test_decode_depends_on_neither_batch_nor_threads(quant, ratio):
    plan = make_plan(64, torch.bfloat16, None, ratio, quant)
    contexts = [(30 * plan.span_tokens + 7, 30), (777 + 3 * plan.span_tokens, 3)]
    case = make_case(plan, torch.bfloat16, 16, 8, contexts)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


def mark_used(run_bytes: torch.Tensor, layout: MatrixLayout, rows: int, columns: int) -> None:
    """Set to 1 what belongs to the first ``rows`` by ``columns`` elements of a matrix."""
    end = layout.offset + layout.rows * layout.row_bytes
    codes = run_bytes[layout.offset : end].view(layout.rows, layout.row_bytes)
    codes[:rows, : -(-columns * layout.encoding.element_bits(layout.itemsize) // 8)] = 1
    if layout.encoding is Encoding.FP8:
        run_bytes[layout.scales_offset : layout.scales_offset + 4] = 1
        if layout.has_zero_points:
            run_bytes[layout.zero_points_offset : layout.zero_points_offset + 2 * rows] = 1
    for start in (layout.scales_offset, layout.zero_points_offset):
        groups = -(-columns // layout.group) if layout.groups else 0
        for group in range(groups):
            first = start + 2 * group * layout.rows
            run_bytes[first : first + 2 * rows] = 1


@formats
@pytest.mark.parametrize("padding", [0x00, 0x7F, 0xFF])
def test_decode_never_uses_padding(quant, ratio, padding):
    # 0x7F and 0xFF spell NaN as fp8, float16, bfloat16 and float32.
    plan = make_plan(64, torch.float32, None, ratio, quant)
    case = make_case(plan, torch.float32, 4, 2, [(2 * plan.span_tokens + 9, 2)])
    before = run(case)
    layout = plan.layout
    for span in range(2):
        for k in range(plan.thin_blocks):
            tokens = min(plan.thin_block_tokens, plan.span_tokens - k * plan.thin_block_tokens)
            used = torch.zeros(layout.run_bytes, dtype=torch.uint8)
            mark_used(used, layout.keys, plan.key_channels, tokens)
            mark_used(used, layout.values, tokens, plan.head_size)
            if layout.has_table:
                used[layout.table_offset : layout.table_offset + plan.key_channels] = 1
            for head in range(2):
                block = int(case.block_table[0, span * plan.span_blocks + k])
                thin_run(case.kv_cache, block, head)[used == 0] = padding
    assert torch.equal(run(case), before)


@formats
@pytest.mark.parametrize("part", ["keys", "values"])
def test_decode_reads_every_byte(quant, ratio, part):
    # Whatever bit of a code, scale or zero is wrong, somebody's output moves, and nobody else's.
    plan = make_plan(64, torch.float32, None, ratio, quant)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)])
    before = run(case)
    layout = getattr(plan.layout, part)
    bytes_ = thin_run(case.kv_cache, int(case.block_table[0, 0]), 1)
    starts = [layout.offset, layout.offset + 3 * layout.row_bytes + 5, layout.scales_offset + 1]
    if layout.encoding.is_integer or layout.has_zero_points:
        starts.append(layout.zero_points_offset + 1)
    for start in starts:
        kept = bytes_[start].clone()
        bytes_[start] ^= 0x08
        after = run(case)
        bytes_[start] = kept
        assert torch.equal(after[:, :2], before[:, :2])
        assert not torch.equal(after[:, 2:], before[:, 2:])
    assert torch.equal(run(case), before)


@formats
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_decode_broken_numbers_show_in_their_head_alone(quant, ratio, bad):
    plan = make_plan(64, torch.float32, None, ratio, quant)
    context = (plan.span_tokens + 9, 1)
    case = make_case(plan, torch.float32, 4, 2, [context, context])
    before = run(case)
    generator = torch.Generator().manual_seed(1)
    tokens = min(plan.thin_block_tokens, plan.span_tokens)
    keys = torch.randn(plan.key_channels, tokens, generator=generator)
    values = torch.randn(tokens, plan.head_size, generator=generator)
    keys[3, 5] = bad
    table = torch.arange(plan.key_channels, dtype=torch.uint8)
    write_thin(case.kv_cache, int(case.block_table[1, 0]), 1, keys, values, table, plan)
    after = run(case)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1, :2], before[1, :2])
    assert after[1, 2:].isnan().all()
