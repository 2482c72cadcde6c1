"""Triton's context attention in the interpreter, against the reference, query by query."""

import pytest
import torch

from csrc_triton.context import context_attention
from tests.kernels.helpers import ROUNDING, SUMMATION, make_plan
from tests.triton.reference import decode_attention_ref, make_case
from tests.triton.test_decode import DEVICE


def check(plan, dtype, heads, requests, soft_cap=0.0) -> None:
    """``requests``: (queries, seq_len, thin_spans) each."""
    case = make_case(plan, dtype, *heads, [(seq_len, thin) for _, seq_len, thin in requests])
    counts = torch.tensor([count for count, _, _ in requests])
    start = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(int(start[-1]), heads[0], plan.head_size, generator=generator).to(dtype)
    on_device = query.to(DEVICE)
    out = torch.full_like(on_device, torch.nan)
    thin = torch.tensor([made[2] for made in requests], dtype=torch.int32)
    lengths = torch.tensor([made[1] for made in requests], dtype=torch.int32, device=DEVICE)
    rows = torch.arange(len(requests), dtype=torch.int32, device=DEVICE)
    context_attention(
        on_device, case.kv_cache.to(DEVICE), case.block_table.to(DEVICE), start.int().to(DEVICE),
        lengths, rows, plan, case.scale, out, int(counts.max()), soft_cap,
        thin.to(DEVICE) if bool(thin.any()) else None,
    )  # fmt: skip
    rows = [
        (index, seq_len - count + i + 1, spans)
        for index, (count, seq_len, spans) in enumerate(requests)
        for i in range(count)
    ]
    expected = decode_attention_ref(
        query, case.kv_cache, case.block_table, *zip(*rows, strict=True), plan, case.scale, soft_cap
    )
    operands = 0 if dtype == torch.float32 else 2 * ROUNDING[dtype]
    tolerance = (ROUNDING[dtype] + operands) * float(expected.abs().max()) + SUMMATION
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (5, 1)])
def test_context_of_dense_blocks(dtype, heads):
    plan = make_plan(64, dtype, 16, 0.5)
    requests = [(17, 17, 0), (5, 70, 0), (1, 33, 0), (40, 47, 0)]
    check(plan, dtype, heads, requests)


@pytest.mark.parametrize("quant", ["none", "fp8", "kivi4", "k4v2"])
@pytest.mark.parametrize("value_ratio", [0.0, 0.3])
def test_context_behind_thin_spans(quant, value_ratio):
    plan = make_plan(64, torch.float32, 16, 0.5, quant, value_ratio=value_ratio)
    span = plan.span_tokens
    check(plan, torch.float32, (4, 2), [(9, span + 20, 1), (3, 40, 0), (4, 2 * span + 4, 2)])


@pytest.mark.parametrize("head_size", [80, 128])
def test_context_head_size(head_size):
    plan = make_plan(head_size, torch.float32, 16, 0.5)
    check(plan, torch.float32, (4, 1), [(20, 50, 0)])


def test_context_soft_cap():
    plan = make_plan(64, torch.float32, 48, 0.5)
    check(plan, torch.float32, (4, 2), [(7, 100, 0)], soft_cap=0.5)


def test_context_rejects_lengths_that_do_not_fit():
    plan = make_plan(64, torch.float32, 16, 0.5)
    case = make_case(plan, torch.float32, 4, 2, [(20, 0)])
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="context_attention: query_start is"):
        context_attention(
            case.query, case.kv_cache, case.block_table, one, one, one, plan, 1.0, case.query, 1
        )
