"""Attention sinks: scores with weight but no value."""

import pytest
import torch

from tests.kernels.helpers import make_case, make_plan
from tests.kernels.test_decode import DTYPES, check, contexts_of, run


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
