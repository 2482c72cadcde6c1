"""Triton's attention over static blocks, decode rows and chunks, against the reference."""

import itertools

import pytest
import torch

from csrc_triton.splits import make_workspace
from csrc_triton.static_blocks import order_channels
from csrc_triton.static_context import static_context
from csrc_triton.static_decode import static_decode
from tests.kernels.helpers import ROUNDING, SUMMATION
from tests.support.static_blocks import KEPT, QUANTS, StaticCase, make_plan
from think_vllm.kernels.reference.static import run_parts

quants = pytest.mark.parametrize("quant", QUANTS)


def decode(case, device, seq_len=None, **options):
    """Attend with one query of each request."""
    query = case.query.to(device)
    out = torch.full_like(query, torch.nan)
    lens = torch.tensor(seq_len or case.lengths, dtype=torch.int32, device=device)
    order = order_channels(case.channels, case.plan.head_size, device)
    static_decode(
        query, case.kv_cache.to(device), case.block_table.to(device), lens, order, case.plan,
        case.scale, out, **options,
    )  # fmt: skip
    return out.cpu()


def context(case, device, query, counts, first=0, **options):
    """Attend with the last ``counts`` queries of each request, leaving out those before ``first``.

    Answers of requests that are left out stay NaN.
    """
    starts = [0, *itertools.accumulate(counts)]
    on_device = query.to(device)
    out = torch.full_like(on_device, torch.nan)
    starts, lens = (
        torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, case.lengths)
    )
    order = order_channels(case.channels, case.plan.head_size, device)
    static_context(
        on_device, case.kv_cache.to(device), case.block_table.to(device), starts, lens, first,
        order, case.plan, case.scale, out, max(counts), **options,
    )  # fmt: skip
    return out.cpu()


def compare(actual, expected, dtype):
    # Tensor cores take weights and values rounded to the model's dtype too.
    operands = 0 if dtype == torch.float32 else 2 * ROUNDING[dtype]
    tolerance = (ROUNDING[dtype] + operands) * float(expected.abs().max()) + SUMMATION
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance)


def check_decode(case, device, cap=0.0, **options):
    rows = list(range(len(case.lengths)))
    expected = case.expected(case.query, rows, case.lengths, cap)
    compare(decode(case, device, logits_soft_cap=cap, **options), expected, case.dtype)


def check_context(case, device, counts, first=0, cap=0.0):
    query = case.random(sum(counts), case.query.shape[1])
    rows = [
        (request, length - count + i + 1)
        for request, (count, length) in enumerate(zip(counts, case.lengths, strict=True))
        for i in range(count)
    ]
    actual = context(case, device, query, counts, first, logits_soft_cap=cap)
    expected = case.expected(query, *map(list, zip(*rows, strict=True)), cap)
    left_out = sum(counts[:first])
    assert actual[:left_out].isnan().all()
    compare(actual[left_out:], expected[left_out:], case.dtype)


@quants
@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_decode_reads_kept_channels(device, kept, quant):
    plan = make_plan(*kept, torch.float32, quant=quant)
    check_decode(StaticCase(plan, torch.float32, (4, 2), [1, 15, 16, 17, 33, 50]), device)


@quants
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_the_dtypes_of_models(device, dtype, quant):
    plan = make_plan(31, 48, dtype, 32, quant=quant)
    case = StaticCase(plan, dtype, (4, 2), [5, 70], gap_blocks=2)
    check_decode(case, device)
    check_context(case, device, [5, 9])


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (17, 1)], ids=str)
def test_attention_serves_any_group(device, heads):
    case = StaticCase(make_plan(32, 48, torch.float32), torch.float32, heads, [3, 40])
    check_decode(case, device)
    check_context(case, device, [3, 7])


@quants
@pytest.mark.parametrize(("head_size", "block_size"), [(80, 48), (128, 128), (256, 16)])
def test_attention_of_other_sizes(device, quant, head_size, block_size):
    plan = make_plan(head_size // 2, head_size - 9, torch.float32, block_size, head_size, quant)
    case = StaticCase(plan, torch.float32, (2, 1), [block_size + 17, block_size])
    check_decode(case, device)
    check_context(case, device, [2, 16])


@pytest.mark.parametrize("splits", [1, 2, 3, 16])
def test_decode_splits(device, splits):
    # More splits than tiles leave empty ones.
    case = StaticCase(make_plan(31, 48, torch.float32), torch.float32, (4, 2), [1, 40, 70])
    workspace = make_workspace(5, 4, 48, splits, device).fill_(torch.nan)
    check_decode(case, device, workspace=workspace)


@quants
def test_context_of_whole_prompts_chunks_and_single_queries(device, quant):
    plan = make_plan(32, 48, torch.float32, quant=quant)
    lengths = [33, 70, 48, 20, 16]
    case = StaticCase(plan, torch.float32, (4, 2), lengths)
    check_context(case, device, [33, 5, 1, 0, 16])
    check_context(case, device, [1, 1, 40, 0, 16], first=2)


@quants
def test_an_answer_does_not_depend_on_how_a_prompt_was_cut(device, quant):
    case = StaticCase(make_plan(31, 48, torch.float32, quant=quant), torch.float32, (4, 2), [40])
    query = case.random(40, 4)
    whole = context(case, device, query, [40])
    chunk = context(case, device, query[-11:], [11])
    case.query = query[-1:]
    torch.testing.assert_close(chunk, whole[-11:], rtol=0, atol=SUMMATION)
    torch.testing.assert_close(decode(case, device), whole[-1:], rtol=0, atol=SUMMATION)


def test_attention_soft_cap(device):
    case = StaticCase(make_plan(32, 48, torch.float32), torch.float32, (4, 2), [5, 70])
    check_decode(case, device, cap=0.5)
    check_context(case, device, [5, 4], cap=0.5)
    assert not torch.equal(decode(case, device, logits_soft_cap=0.5), decode(case, device))


@pytest.mark.parametrize("kept", [(32, 64), (32, 40)])
def test_decode_of_padding_is_zero(device, kept):
    case = StaticCase(make_plan(*kept, torch.float32), torch.float32, (4, 2), [5, 20])
    out = decode(case, device, [0, 20])
    assert not out[0].any()
    assert out[1].any()


def test_queries_that_see_nothing_are_zero(device):
    # As in runs without requests, by which vLLM warms up.
    case = StaticCase(make_plan(32, 40, torch.float32), torch.float32, (4, 2), [5])
    query = case.random(9, 4)
    out = context(case, device, query, [9])
    assert not out[:4].any()
    compare(out[4:], case.expected(query[4:], [0] * 5, [1, 2, 3, 4, 5]), torch.float32)


@quants
def test_attention_notices_a_wrong_key(device, quant):
    case = StaticCase(make_plan(32, 64, torch.float32, quant=quant), torch.float32, (4, 2), [40])
    query = case.random(3, 4)
    before = decode(case, device), context(case, device, query, [3])
    keys, _, _ = run_parts(case.kv_cache, int(case.block_table[0, 1]), 0, case.plan)
    keys[:, :8] = 0
    after = decode(case, device), context(case, device, query, [3])
    for one, other in zip(before, after, strict=True):
        assert not torch.allclose(one[:, :2], other[:, :2], atol=1e-3)
        assert torch.equal(one[:, 2:], other[:, 2:])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("query", lambda case: case.query.bfloat16(), "keys and queries are torch.bfloat16"),
        ("query", lambda case: torch.zeros(1, 3, 64), "3 heads, there are 2 KV heads"),
        ("query", lambda case: torch.zeros(1, 4, 80), "expected .tokens, Hq, 64"),
        ("out", lambda case: torch.zeros(2, 4, 64), "out has shape"),
        ("kv_cache", lambda case: case.kv_cache[:, :, :, 1:], "kv_cache has shape"),
        ("block_table", lambda case: case.block_table.long(), "block_table is torch.int64"),
        ("block_table", lambda case: case.block_table[:0], "block_table has 0 rows"),
        ("seq_len", lambda case: torch.ones(1), "seq_len is torch.float32"),
        ("order", lambda case: order_channels(case.channels, 80, torch.device("cpu")), "order.key"),
    ],
)
def test_attention_rejects(name, change, message):
    case = StaticCase(make_plan(32, 48, torch.float32), torch.float32, (4, 2), [20])
    shared = ("query", "kv_cache", "block_table", "plan", "scale")
    arguments = {key: getattr(case, key) for key in shared} | {
        "seq_len": torch.full((1,), 20, dtype=torch.int32),
        "order": order_channels(case.channels, 64, torch.device("cpu")),
        "out": torch.empty_like(case.query),
    }
    arguments[name] = change(case)
    with pytest.raises(ValueError, match=f"static_decode: .*{message}"):
        static_decode(**arguments)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"static_context: .*{message}"):
        static_context(**arguments, query_start=starts, first=0, max_query_len=1)


def test_attention_rejects_what_is_its_own():
    case = StaticCase(make_plan(32, 48, torch.float32), torch.float32, (4, 2), [20])
    order = order_channels(case.channels, 64, torch.device("cpu"))
    one = torch.ones(1, dtype=torch.int32)
    given = (case.query, case.kv_cache, case.block_table)
    rest = (order, case.plan, 1.0, case.query.clone())
    with pytest.raises(ValueError, match=r"workspace is .1, 4, 2, 66.; expected .1 or more, 4"):
        static_decode(*given, one, *rest, workspace=torch.zeros(1, 4, 2, 66))
    with pytest.raises(ValueError, match="query_start is"):
        static_context(*given, one, one, 0, *rest, 1)
    with pytest.raises(ValueError, match="first is 2"):
        static_context(*given, torch.zeros(2, dtype=torch.int32), one, 2, *rest, 1)
