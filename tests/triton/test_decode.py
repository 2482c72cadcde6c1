"""Triton's decode attention in the interpreter, against the reference."""

import math

import numpy as np
import pytest
import torch

from csrc_triton.decode import decode_attention, decode_splits
from csrc_triton.splits import choose_splits, make_workspace
from tests.kernels.helpers import FORMATS, ROUNDING, SUMMATION, Case, make_plan
from tests.support.tables import crossed
from tests.triton.reference import decode_attention_ref, make_case
from think_vllm.kernels.reference.compaction import thin_run

USUAL, GROUPED = ("none", "fp8", "k4v2"), ("kivi4", "k4v2", "kivi2")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run(case: Case, **options) -> torch.Tensor:
    query = case.query.to(DEVICE)
    out = torch.full_like(query, torch.nan)
    rows = (case.rows.request, case.rows.seq_len, case.rows.thin_spans)
    decode_attention(
        query, case.kv_cache.to(DEVICE), case.block_table.to(DEVICE),
        *(torch.from_numpy(np.ascontiguousarray(values)).to(DEVICE) for values in rows),
        case.plan, case.scale, out, **options,
    )  # fmt: skip
    return out.cpu()


def check(case: Case, logits_soft_cap: float = 0.0, **options) -> None:
    expected = decode_attention_ref(
        case.query, case.kv_cache, case.block_table, *case.reference_rows, case.plan, case.scale,
        logits_soft_cap,
    )  # fmt: skip
    actual = run(case, logits_soft_cap=logits_soft_cap, **options).double()
    # Tensor cores take weights, and queries times scales, rounded to the cache's dtype too.
    operands = 0 if case.query.dtype == torch.float32 else 2 * ROUNDING[case.query.dtype]
    largest = float(expected.abs().max())
    tolerance = (ROUNDING[case.query.dtype] + operands) * largest + SUMMATION
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def contexts_of(plan) -> list[tuple[int, int]]:
    N, span = plan.block_size, plan.span_tokens
    return [(0, 0), (1, 0), (N + 1, 0), (span + 1, 1), (2 * span - 1, 1), (2 * span + 7, 2)]


@crossed({"dtype": [torch.float32, torch.bfloat16], "thin": FORMATS})
def test_decode_formats(thin, dtype):
    plan = make_plan(64, dtype, 16, **thin)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


# Channels in fours, as 64 and 128 are, and not, as 30 are: they lie otherwise in registers.
@crossed(
    {
        "ratio, head_size": [(0.0, 64), (0.5, 64), (0.4, 128)],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_decode_of_biased_fp8_keys(ratio, head_size, dtype):
    plan = make_plan(head_size, dtype, None, ratio, "fp8")
    check(make_case(plan, dtype, 4, 2, contexts_of(plan), key_bias=10.0))


@pytest.mark.parametrize(
    ("head_size", "block_size", "quant", "group", "value_ratio"),
    [
        *((size, 16, quant, 32, 0.0) for size in (96, 128, 256) for quant in USUAL),
        *((64, size, quant, 32, 0.0) for size in (32, 48, 128) for quant in USUAL),
        *((128, 16, quant, size, 0.0) for size in (64, 128) for quant in GROUPED),
        (80, 16, "none", 32, 0.0),  # integer codes need a multiple of 32
        (80, 16, "fp8", 32, 0.0),
        (80, 16, "none", 32, 0.3),
        (96, 16, "k4v2", 32, 0.3),
        (128, 16, "kivi4", 64, 0.3),
        (128, 16, "k4v2", 128, 0.3),
        (256, 16, "fp8", 32, 0.3),
    ],
)
def test_decode_of_other_sizes(head_size, block_size, quant, group, value_ratio):
    plan = make_plan(head_size, torch.float32, block_size, 0.5, quant, group, value_ratio)
    contexts = [(plan.span_tokens + block_size + 3, 1), (5, 0)]
    check(make_case(plan, torch.float32, 4, 2, contexts))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (32, 1)])
def test_decode_group_size(num_heads, num_kv_heads):
    plan = make_plan(64, torch.float32, 16, 0.5, "k4v2")
    contexts = [(plan.span_tokens + 17, 1), (5, 0)]
    check(make_case(plan, torch.float32, num_heads, num_kv_heads, contexts))


@crossed(
    {
        "splits": [2, 3, 5, 16],
        "quant, value_ratio": [("none", 0.3), ("k4v2", 0.0), ("none", 0.0), ("k4v2", 0.3)],
    }
)
def test_decode_splits(quant, splits, value_ratio):
    # More splits than blocks leave empty ones; a split may start within a span.
    plan = make_plan(64, torch.float32, 16, 0.5, quant, value_ratio=value_ratio)
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan))
    workspace = make_workspace(8, 4, 64, splits, DEVICE).fill_(torch.nan)
    check(case, workspace=workspace)


def test_decode_soft_cap():
    plan = make_plan(64, torch.float32, 16, 0.5, "k4v2")
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan))
    check(case, logits_soft_cap=0.5)
    assert not torch.equal(run(case, logits_soft_cap=0.5), run(case))


def test_decode_interleaved_layers_and_strides():
    plan = make_plan(64, torch.float32, 16, 0.5)
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan), gap_blocks=2)
    check(case)
    expected = run(case)
    wide = torch.full((case.query.shape[0], 9, 64), torch.nan)
    wide[:, :8:2] = case.query
    case.query = wide[:, :8:2]
    assert torch.equal(run(case), expected)


@pytest.mark.parametrize("thin", [thin for thin in FORMATS if not thin["value_ratio"]], ids=str)
def test_decode_reads_the_keys(thin):
    plan = make_plan(64, torch.float32, 16, **thin)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)])
    before = run(case)
    run_bytes = thin_run(case.kv_cache, int(case.block_table[0, 0]), 1)
    run_bytes[plan.layout.keys.row_bytes + 3] ^= 0x08  # not the last bits of a float32
    after = run(case)
    assert torch.equal(after[:, :2], before[:, :2])
    assert not torch.equal(after[:, 2:], before[:, 2:])


def test_decode_nan_shows_in_its_head_alone():
    plan = make_plan(64, torch.float32, 16, 0.5)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)])
    case.kv_cache[int(case.block_table[0, 0]), 0].view(-1)[5] = torch.nan
    out = run(case)
    assert out[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()


@pytest.mark.parametrize("magnitude", [1e-4, 1e4, 1e7])
@pytest.mark.parametrize("quant", ["fp8", "kivi4", "kivi2"])
def test_decode_of_queries_beyond_float16(quant, magnitude):
    # Quantized blocks are multiplied in float16, whatever the model's dtype; it ends at 65,504.
    plan = make_plan(64, torch.bfloat16, 16, 0.5, quant)
    case = make_case(plan, torch.bfloat16, 4, 2, [(plan.span_tokens + 9, 1), (40, 0)])
    case.query[:, ::2] *= magnitude
    case.scale /= magnitude
    check(case)


def test_choose_splits_fills_the_gpu_with_few():
    def filled(rows, context):
        splits = choose_splits(rows, 8, context, multiprocessors=132, programs=16)
        waves = rows * 8 * splits / (132 * 16)
        return splits, waves / math.ceil(waves)

    for rows in (33, 64, 128, 200, 256, 512):
        splits, share = filled(rows, 8192)
        assert share >= 0.85, rows
        assert all(rows * 8 * fewer / (132 * 16) % 1 < 0.85 for fewer in range(1, splits)), rows
    assert filled(64, 8192)[0] == 4
    assert filled(256, 8192)[0] == 1
    # One request cannot fill it: splits are as many as there is work for, or memory to sum them.
    assert filled(1, 8192)[0] == 32
    assert filled(1, 131_072)[0] == 128
    assert filled(1, 300)[0] == 2
    assert filled(1, 1)[0] == 1


def test_splits_count_the_programs_of_the_launch():
    def splits(quant, heads, head_size=128, rows=64):
        plan = make_plan(head_size, torch.bfloat16, 16, 0.5, quant)
        return decode_splits(rows, *heads, 8192, plan, torch.device("cpu"))

    # 132 multiprocessors of 12 places, of 8 for 2-bit keys, and of 4 for two warps each.
    assert splits("k4v2", (32, 8)) == 3
    assert splits("kivi2", (32, 8)) == 2
    assert splits("k4v2", (32, 8), 256) == 1
    # A group of 32 is two programs.
    assert splits("k4v2", (32, 1), rows=8) == splits("k4v2", (32, 2), rows=8) == 32


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda case: case.query.bfloat16(), "expected one dtype"),
        ("query", lambda case: torch.zeros(1, 3, 64), "3 heads, there are 2 KV heads"),
        ("query", lambda case: torch.zeros(1, 4, 80), "expected .tokens, Hq, 64"),
        ("out", lambda case: torch.zeros(2, 4, 64), "out has shape"),
        ("kv_cache", lambda case: case.kv_cache.bfloat16(), "the plan is for blocks"),
        ("kv_cache", lambda case: case.kv_cache[0], "expected bfloat16"),
        ("block_table", lambda case: case.block_table.long(), "expected int32"),
        ("seq_len", lambda case: torch.ones(2, dtype=torch.int32), "seq_len is"),
        ("thin_spans", lambda case: torch.zeros(1), "thin_spans is"),
        ("workspace", lambda case: torch.zeros(0, 4, 1, 66), "at least 1 rows and a split"),
        ("scale", lambda case: 0.0, "scale is 0.0; expected a positive"),
    ],
)
def test_decode_rejects(name, change, message):
    case = make_case(make_plan(64, torch.float32, 16), torch.float32, 4, 2, [(20, 0)])
    zero = torch.zeros(1, dtype=torch.int32)
    arguments = {
        key: getattr(case, key) for key in ("query", "kv_cache", "block_table", "plan", "scale")
    }
    arguments |= {"request": zero, "seq_len": zero + 20, "thin_spans": zero}
    arguments |= {"out": torch.empty_like(case.query), name: change(case)}
    with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
        decode_attention(**arguments)
