import numpy as np
import pytest
import torch

from tests.kernels.helpers import ROUNDING, SUMMATION, Case, make_case, make_plan, make_rows
from think_vllm.kernels.cpu.decode import DecodeRows, decode_attention
from think_vllm.kernels.reference.attention import decode_attention_ref
from think_vllm.kernels.reference.compaction import thin_run

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(case: Case, **options) -> torch.Tensor:
    out = torch.full_like(case.query, torch.nan)
    decode_attention(
        case.query, case.kv_cache, case.block_table, case.rows, case.plan, case.scale, out,
        **options,
    )  # fmt: skip
    return out


def check(case: Case, tolerance: float = 0.0, **options) -> None:
    expected = decode_attention_ref(
        case.query, case.kv_cache, case.block_table, *case.reference_rows, case.plan, case.scale,
        **options,
    )  # fmt: skip
    rounding = ROUNDING[case.query.dtype] * float(expected.abs().max()) + SUMMATION
    actual = run(case, **options).double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance or rounding)


def contexts_of(plan) -> list[tuple[int, int]]:
    """Odd lengths, ends of blocks and spans, with and without thin spans."""
    N, span = plan.block_size, plan.span_tokens
    dense = [(1, 0), (N - 1, 0), (N, 0), (N + 1, 0), (2 * span + 3, 0)]
    return [*dense, (span, 1), (span + 1, 1), (span + N, 1), (2 * span - 1, 1), (3 * span + 7, 3)]


def random_contexts(plan, rng, most_spans) -> list[tuple[int, int]]:
    """Fewer than ``most_spans`` thin spans in each, and a tail."""
    spans = [int(rng.integers(0, most_spans)) for _ in range(4)]
    size = plan.span_tokens
    return [(thin * size + int(rng.integers(1, 3 * size)), thin) for thin in spans]


def run_with_threads(threads: int, case: Case) -> torch.Tensor:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        return run(case)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_decode_head_size(dtype, head_size):
    plan = make_plan(head_size, dtype, block_size=None)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(3, 3), (4, 2), (8, 2), (5, 1), (8, 1), (7, 1), (16, 1)],
    ids=lambda n: str(n),
)
def test_decode_group_size(dtype, num_heads, num_kv_heads):
    plan = make_plan(64, dtype, block_size=32)
    check(make_case(plan, dtype, num_heads, num_kv_heads, contexts_of(plan)))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 80, 96, 112, 128])
def test_decode_block_size(block_size):
    plan = make_plan(64, torch.bfloat16, block_size, ratio=0.6)
    check(make_case(plan, torch.bfloat16, 4, 1, contexts_of(plan)))


@pytest.mark.parametrize("seed", range(20))
def test_decode_random_contexts(seed):
    rng = np.random.default_rng(seed)
    plan = make_plan(64, torch.float32, ratio=float(rng.choice([0.4, 0.5, 0.6, 0.7])))
    contexts = random_contexts(plan, rng, 5)
    check(make_case(plan, torch.float32, 4, 2, contexts, seed))


def test_decode_rows_of_one_request():
    plan = make_plan(64, torch.float32)
    span = plan.span_tokens
    case = make_case(plan, torch.float32, 4, 2, [(3 * span + 9, 2), (span, 0)])
    rows = [(0, 3 * span + 9 - back, 2) for back in (3, 2, 1, 0)] + [(1, span, 0), (1, 5, 0)]
    case.rows = make_rows(rows)
    case.query = torch.randn(len(rows), 4, 64, generator=torch.Generator().manual_seed(1))
    check(case)


def test_decode_rows_with_different_thin_spans():
    plan = make_plan(64, torch.float32)
    span, s = plan.span_tokens, plan.span_blocks
    case = make_case(plan, torch.float32, 4, 2, [(3 * span, 2), (3 * span, 0)])
    # The second span of request 0 points at dense blocks for a row that sees it dense.
    case.block_table[0, s : 3 * s] = case.block_table[1, s : 3 * s]
    case.rows = make_rows([(0, 2 * span + 5, 1), (0, span + 1, 1)])
    check(case)


def test_decode_padding_rows_are_zero():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(7, 0), (40, 0)])
    case.rows.seq_len[0] = 0
    out = run(case)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert out[1].isfinite().all()
    case.rows.seq_len[:] = 0
    assert torch.equal(run(case), torch.zeros_like(out))


def test_decode_no_rows():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(7, 0)])
    case.query, case.rows = case.query[:0], make_rows([])
    assert run(case).shape == (0, 4, 64)


def test_decode_interleaved_layers():
    plan = make_plan(64, torch.bfloat16)
    case = make_case(plan, torch.bfloat16, 4, 2, contexts_of(plan), gap_blocks=2)
    assert not case.kv_cache.is_contiguous()
    check(case)


def test_decode_strided_query_out_and_table():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan))
    expected = run(case)
    num_rows = case.query.shape[0]
    wide_query = torch.full((num_rows, 8, 64), torch.nan)
    wide_query[:, :4] = case.query
    wide_table = torch.zeros(num_rows, case.block_table.shape[1] + 5, dtype=torch.int32)
    wide_table[:, : case.block_table.shape[1]] = case.block_table
    wide_out = torch.full((num_rows, 6, 64), torch.nan)
    decode_attention(
        wide_query[:, :4], case.kv_cache, wide_table[:, : case.block_table.shape[1]], case.rows,
        plan, case.scale, wide_out[:, :4],
    )  # fmt: skip
    assert torch.equal(wide_out[:, :4], expected)
    assert wide_out[:, 4:].isnan().all()


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_decode_soft_cap(cap):
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan))
    check(case, logits_soft_cap=cap)
    assert not torch.equal(run(case, logits_soft_cap=cap), run(case))


@pytest.mark.parametrize("sink", [-1e4, -1.0, 3.0, 40.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_sinks(sink, dtype):
    # Far below the scores, among them, and so far above that next to nothing is left of them.
    plan = make_plan(64, dtype)
    case = make_case(plan, dtype, 4, 2, [*contexts_of(plan), (1500, 5)])
    sinks = sink + torch.arange(4).to(dtype) / 4
    check(case, sinks=sinks)
    check(case, sinks=sinks, logits_soft_cap=2.0)
    assert torch.equal(run(case, sinks=sinks), run(case)) == (sink == -1e4)


def test_decode_sinks_belong_to_query_heads():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 6, 2, contexts_of(plan))
    sinks = torch.full((6,), -1.0)
    before = run(case, sinks=sinks)
    sinks[3] = 4.0
    changed = (run(case, sinks=sinks) != before).any(dim=2).any(dim=0)
    assert changed.tolist() == [False, False, False, True, False, False]


def test_decode_sinks_leave_padding_rows_zero():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(7, 0), (40, 0)])
    case.rows.seq_len[0] = 0
    assert not run(case, sinks=torch.ones(4))[0].any()


@pytest.mark.parametrize("factor", [1e-3, 30.0, 1e4])
def test_decode_scores_of_any_size(factor):
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, contexts_of(plan))
    case.query *= factor
    # Scores of size s carry float32 errors of s * 2 ** -24 times a few: so do the weights.
    check(case, tolerance=3e-5 * max(1.0, factor / 10))


@pytest.mark.parametrize("threads", [1, 2])
def test_decode_depends_on_neither_batch_nor_threads(threads):
    plan = make_plan(64, torch.bfloat16)
    case = make_case(plan, torch.bfloat16, 4, 2, [(3 * plan.span_tokens + 7, 2)] * 20)
    long = make_case(plan, torch.bfloat16, 16, 8, [(4000, 40), (777, 3)], seed=1)
    expected = run(case), run(long)
    assert torch.equal(run_with_threads(threads, case), expected[0])
    assert torch.equal(run_with_threads(threads, long), expected[1])
    long.query = long.query[1:]
    long.rows = DecodeRows(*(a[1:] for a in (long.rows.request, long.rows.seq_len,
                                             long.rows.thin_spans)))  # fmt: skip
    assert torch.equal(run(long), expected[1][1:])


@pytest.mark.parametrize("kind", ["thin", "dense"])
def test_decode_reads_the_keys(kind):
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)])
    before = run(case)
    if kind == "thin":
        block = int(case.block_table[0, 0])
        case.kv_cache[block, 1].view(-1)[3 * plan.thin_block_tokens + 5] += 1.0
    else:
        block = int(case.block_table[0, plan.span_blocks])
        case.kv_cache[block, 1].view(-1)[3 * plan.block_size + 5] += 1.0
    after = run(case)
    assert torch.equal(after[:, :2], before[:, :2])  # the other KV head
    assert not torch.allclose(after[:, 2:], before[:, 2:], rtol=0, atol=1e-4)


def test_decode_reads_the_tables():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(2 * plan.span_tokens + 9, 2)])
    before = run(case)
    entry = plan.span_blocks  # first thin block of the second span
    bytes_ = thin_run(case.kv_cache, int(case.block_table[0, entry]), 0)
    table = bytes_[plan.layout.table_offset :][: plan.key_channels]
    table.copy_(table.flip(0))
    assert not torch.allclose(run(case)[:, :2], before[:, :2], rtol=0, atol=1e-4)


def test_decode_nan_in_the_context_is_not_hidden():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)])
    block = int(case.block_table[0, 0])
    case.kv_cache[block, 0].view(-1)[3 * plan.thin_block_tokens + 5] = torch.nan
    out = run(case)
    assert out[:, :2].isnan().all()
    assert out[:, 2:].isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("plan", lambda case: make_plan(64, torch.float32, 32), "plan is for blocks of .32, 128."),
        ("plan", lambda case: make_plan(128, torch.float32), "plan is for blocks of .16, 256."),
        ("kv_cache", lambda case: case.kv_cache.bfloat16(), "elements of 4 bytes"),
        ("kv_cache", lambda case: case.kv_cache.transpose(1, 2).contiguous().transpose(1, 2),
         "must be contiguous"),
        ("kv_cache", lambda case: case.kv_cache[0], "or float32 .num_blocks"),
        ("block_table", lambda case: case.block_table.long(), "expected int32"),
        ("query", lambda case: case.query.bfloat16(), "expected one dtype"),
        ("query", lambda case: torch.zeros(1, 3, 64), "3 heads, there are 2 KV heads"),
        ("query", lambda case: torch.zeros(1, 4, 80), "expected .tokens, Hq, 64"),
        ("out", lambda case: torch.zeros(2, 4, 64), "out has shape"),
        ("rows", lambda case: make_rows([(0, 1, 0)] * 2), "rows.request has shape"),
        ("sinks", lambda case: torch.zeros(2), "sinks has shape .2,.; expected one per query head"),
    ],
)  # fmt: skip
def test_decode_rejects(name, change, message):
    case = make_case(make_plan(64, torch.float32), torch.float32, 4, 2, [(20, 0)])
    given = ("query", "kv_cache", "block_table", "rows", "plan", "scale")
    arguments = {key: getattr(case, key) for key in given} | {"out": torch.empty_like(case.query)}
    with pytest.raises(ValueError, match=f"decode_attention: .*{message}"):
        decode_attention(**arguments | {name: change(case)})
