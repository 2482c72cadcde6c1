"""Decode attention over every format of thin blocks, against the reference."""

import numpy as np
import pytest
import torch

from tests.kernels.helpers import FORMATS, formats, make_case, make_plan
from tests.kernels.test_decode import check, contexts_of, random_contexts, run, run_with_threads
from tests.support.tables import crossed
from think_vllm.kernels.reference.compaction import thin_run, write_thin
from think_vllm.plan.formats import Encoding
from think_vllm.plan.matrix_layout import MatrixLayout

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Codes of keys and values, all of which are kept of the values.
CODED = [(x["quant"], x["ratio"]) for x in FORMATS if x["quant"] != "none" and not x["value_ratio"]]
coded_with_all_values = pytest.mark.parametrize(("quant", "ratio"), CODED)


@crossed({"dtype": [FP32, BF16], "head_size": [64, 96, 128], "thin": FORMATS})
def test_decode_head_size(dtype, head_size, thin):
    plan = make_plan(head_size, dtype, None, **thin)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@coded_with_all_values
def test_decode_of_biased_keys(quant, ratio):
    plan = make_plan(64, FP32, None, ratio, quant)
    check(make_case(plan, FP32, 4, 2, contexts_of(plan), key_bias=10.0))


@pytest.mark.parametrize(
    ("head_size", "dtype", "quant", "ratio", "value_ratio", "block_size", "group"),
    [
        (64, FP16, "fp8", 0.5, 0.0, None, 32),
        (64, FP16, "k4v2", 0.5, 0.0, None, 32),
        (64, FP16, "none", 0.5, 0.3, 48, 32),
        (80, FP32, "fp8", 0.5, 0.0, None, 32),  # no multiple of 32
        (80, FP32, "none", 0.5, 0.4, None, 32),
        (64, FP32, "fp8", 0.5, 0.3, 128, 32),
        (128, FP32, "kivi4", 0.5, 0.3, 96, 64),
        (128, FP32, "k4v2", 0.0, 0.5, 32, 128),
        (128, FP32, "kivi2", 0.4, 0.8, 16, 64),
        (256, BF16, "none", 0.0, 0.6, 16, 32),
        *((256, dtype, quant, ratio, 0.0, None, 32) for dtype in (FP32, BF16)
          for quant in ("fp8", "kivi4", "k4v2", "kivi2") for ratio in (0.0, 0.5)),
        *((128, FP32, quant, ratio, 0.0, None, group) for group in (64, 128)
          for quant in ("kivi4", "k4v2", "kivi2") for ratio in (0.0, 0.4)),
    ],
)  # fmt: skip
def test_decode_of_other_sizes(head_size, dtype, quant, ratio, value_ratio, block_size, group):
    plan = make_plan(head_size, dtype, block_size, ratio, quant, group, value_ratio)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize(
    ("quant", "value_ratio"), [("fp8", 0.0), ("k4v2", 0.0), ("none", 0.3), ("k4v2", 0.3)]
)
def test_decode_group_size(num_heads, num_kv_heads, quant, value_ratio):
    plan = make_plan(64, FP32, None, 0.5, quant, value_ratio=value_ratio)
    check(make_case(plan, FP32, num_heads, num_kv_heads, contexts_of(plan)))


@crossed({"block_size": [16, 32, 48, 64, 80, 96, 112, 128], "quant, ratio": CODED})
def test_decode_block_size(block_size, quant, ratio):
    plan = make_plan(64, FP32, block_size, ratio, quant)
    check(make_case(plan, FP32, 4, 1, contexts_of(plan)))


@formats
def test_decode_random_contexts(thin):
    # Splits begin inside spans, and every span has tables of its own.
    plan = make_plan(64, FP32, None, **thin)
    for seed in range(5):
        contexts = random_contexts(plan, np.random.default_rng(seed), 12)
        check(make_case(plan, FP32, 4, 2, contexts, seed))


@formats
def test_decode_depends_on_neither_batch_nor_threads(thin):
    plan = make_plan(64, BF16, None, **thin)
    contexts = [(30 * plan.span_tokens + 7, 30), (777 + 3 * plan.span_tokens, 3)]
    case = make_case(plan, BF16, 16, 8, contexts)
    assert torch.equal(run_with_threads(1, case), run_with_threads(2, case))


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


@crossed({"thin": FORMATS, "padding": [0x00, 0x7F, 0xFF]})
def test_decode_never_uses_padding(thin, padding):
    # 0x7F and 0xFF spell NaN as fp8, float16, bfloat16 and float32.
    plan = make_plan(64, FP32, None, **thin)
    case = make_case(plan, FP32, 4, 2, [(2 * plan.span_tokens + 9, 2)])
    before, layout = run(case), plan.layout
    for span in range(2):
        for k in range(plan.thin_blocks):
            tokens = min(plan.thin_block_tokens, plan.span_tokens - k * plan.thin_block_tokens)
            used = torch.zeros(layout.run_bytes, dtype=torch.uint8)
            mark_used(used, layout.keys, plan.key_channels, tokens)
            mark_used(used, layout.values, tokens, plan.value_channels)
            end = layout.value_table_offset + plan.value_channels * layout.has_value_table
            used[layout.table_offset : end] = 1
            block = int(case.block_table[0, span * plan.span_blocks + k])
            for head in range(2):
                thin_run(case.kv_cache, block, head)[used == 0] = padding
    assert torch.equal(run(case), before)


@coded_with_all_values
@pytest.mark.parametrize("part", ["keys", "values"])
def test_decode_reads_every_byte(quant, ratio, part):
    # Whatever bit of a code, scale or zero is wrong, somebody's output moves, and nobody else's.
    plan = make_plan(64, FP32, None, ratio, quant)
    case = make_case(plan, FP32, 4, 2, [(plan.span_tokens + 9, 1)])
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


@crossed({"quant, ratio": CODED, "bad": [torch.nan, torch.inf, -torch.inf]})
def test_decode_broken_numbers_show_in_their_head_alone(quant, ratio, bad):
    plan = make_plan(64, FP32, None, ratio, quant)
    context = (plan.span_tokens + 9, 1)
    case = make_case(plan, FP32, 4, 2, [context, context])
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


@pytest.mark.parametrize("quant", ["none", "k4v2"])
def test_decode_scatters_values_by_their_tables(quant):
    plan = make_plan(64, FP32, None, 0.5, quant, value_ratio=0.3)
    case = make_case(plan, FP32, 4, 2, [(plan.span_tokens, 1)])
    block = int(case.block_table[0, 0])
    kept = torch.zeros(2, 64, dtype=torch.bool)
    for head in range(2):
        table = thin_run(case.kv_cache, block, head)[plan.layout.value_table_offset :]
        kept[head, table[: plan.value_channels].long()] = True
    assert int(kept.sum()) == 2 * plan.value_channels < 2 * 64
    assert torch.equal(run(case)[0].view(2, 2, 64) != 0, kept[:, None].expand(2, 2, 64))
