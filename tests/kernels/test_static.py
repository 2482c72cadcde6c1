"""Static blocks against the plain reference, over caches in which all else is a NaN."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.helpers import ROUNDING, SUMMATION
from tests.support.static_blocks import KEPT, QUANTS, StaticCase, make_plan
from tests.support.tables import crossed
from think_vllm.kernels.cpu.static_attention import static_attention
from think_vllm.kernels.cpu.static_store import read_back, static_parts, store_static
from think_vllm.kernels.reference.static import read_run, run_parts, store_static_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attend(case: StaticCase, lengths: list[int] | None = None, **changes: Any) -> torch.Tensor:
    """Attend with a query of each request."""
    out = torch.full_like(case.query, 7.0)
    given = {name: getattr(case, name) for name in ("block_table", "channels", "plan", "scale")}
    rows = np.arange(len(case.lengths), dtype=np.int32)
    lens = np.array(lengths or case.lengths, np.int32)
    static_attention(
        case.query, case.kv_cache, request=rows, seq_len=lens, out=out, **given | changes
    )
    return out


def check(case: StaticCase, cap: float = 0.0, sinks: torch.Tensor | None = None) -> None:
    """Compare kernel and reference."""
    out = attend(case, logits_soft_cap=cap, sinks=sinks)
    expected = case.expected(case.query, list(range(len(case.lengths))), case.lengths, cap, sinks)
    tolerance = ROUNDING[case.dtype] * float(expected.abs().max()) + SUMMATION
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


@crossed({"quant": QUANTS, "dtype": DTYPES, "kept": KEPT})
def test_static_attention_reads_kept_channels(kept, dtype, quant):
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, 100]
    check(StaticCase(make_plan(*kept, dtype, quant=quant), dtype, (4, 2), lengths))


@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (6, 2), (8, 1)], ids=str)
def test_static_attention_serves_any_group(heads):
    check(StaticCase(make_plan(32, 64, torch.bfloat16), torch.bfloat16, heads, [3, 40]))


@pytest.mark.parametrize("quant", QUANTS)
def test_static_attention_combines_splits(quant):
    # 512 tokens are a split; three, and one token more.
    plan = make_plan(64, 96, torch.float32, block_size=128, head_size=128, quant=quant)
    check(StaticCase(plan, torch.float32, (4, 2), [1537, 1536, 513, 512]))


@pytest.mark.parametrize("quant", QUANTS)
def test_static_attention_reads_blocks_with_gaps(quant):
    # As vLLM lays out layers that share an allocation.
    plan = make_plan(31, 48, torch.bfloat16, quant=quant)
    check(StaticCase(plan, torch.bfloat16, (4, 2), [5, 70], gap_blocks=2))


def test_static_attention_caps_and_sinks():
    case = StaticCase(make_plan(32, 48, torch.float32), torch.float32, (4, 2), [5, 70])
    check(case, cap=2.0)
    check(case, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0]))


def test_static_attention_of_padding_is_zero():
    for kept in ((32, 64), (32, 40)):
        case = StaticCase(make_plan(*kept, torch.float32), torch.float32, (4, 2), [5, 20])
        out = attend(case, [0, 20])
        assert not out[0].any()
        assert out[1].any()


def test_static_attention_notices_a_wrong_key():
    case = StaticCase(make_plan(32, 64, torch.float32), torch.float32, (4, 2), [40])
    before = attend(case)
    keys, _, _ = run_parts(case.kv_cache, int(case.block_table[0, 1]), 0, case.plan)
    keys *= -1
    assert not torch.allclose(before, attend(case), atol=1e-3)


@crossed({"quant": QUANTS, "dtype": DTYPES, "kept": KEPT})
def test_store_static_writes_the_reference_bytes(kept, dtype, quant):
    plan = make_plan(*kept, dtype, quant=quant)
    case = StaticCase(plan, dtype, (4, 2), [37, 16, 1], gap_blocks=1)
    key, value = case.random(60, 2), case.random(60, 2)
    key[3], value[4] = 0.0, 1e-38
    key[7, 0, 1], value[8, 1, 2] = torch.inf, torch.nan
    # A step of three requests, in which a slot is negative and keys are padded.
    slots = [slot for request in range(3) for slot in case.slots(request)]
    slots[5] = -1
    expected, written = case.kv_cache.clone(), case.kv_cache
    store_static_ref(key, value, expected, slots, *case.kept_lists(), plan)
    store_static(key, value, written, torch.tensor(slots), case.channels, plan)
    assert torch.equal(written.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("quant", QUANTS)
def test_read_back_is_what_the_cache_says(quant):
    # What prompts see that start in a step, and what later queries see of them.
    plan = make_plan(31, 48, torch.float32, quant=quant)
    case = StaticCase(plan, torch.float32, (4, 2), [16])
    key, value = case.random(16, 2), case.random(16, 2)
    store_static(key, value, case.kv_cache, torch.tensor(case.slots(0)), case.channels, plan)
    whole_key = read_back(key, case.channels.keys, plan)
    whole_value = read_back(value, case.channels.values, plan)
    for head in range(2):
        keys, values = read_run(case.kv_cache, int(case.block_table[0, 0]), head, plan)
        kept_keys, kept_values = case.channels.keys[head], case.channels.values[head]
        assert torch.equal(whole_key[:, head, kept_keys].T, keys.float())
        assert torch.equal(whole_value[:, head, kept_values], values.float())
        assert int(whole_key[:, head].any(dim=0).sum()) == 31
        assert int(whole_value[:, head].any(dim=0).sum()) == 48


def test_static_parts_are_those_of_the_reference():
    plan = make_plan(31, 48, torch.bfloat16, quant="fp8")
    case = StaticCase(plan, torch.bfloat16, (4, 2), [40], gap_blocks=1)
    parts = static_parts(case.kv_cache, plan)
    block = int(case.block_table[0, 1])
    for head in range(2):
        keys, values, scales = run_parts(case.kv_cache, block, head, plan)
        assert torch.equal(parts.keys[block, head], keys)
        assert torch.equal(parts.values[block, head], values)
        assert torch.equal(parts.key_scales[block, head], scales[0])
        assert torch.equal(parts.value_scales[block, head], scales[1])


def test_launchers_reject_what_does_not_fit():
    plan = make_plan(32, 64, torch.float32)
    case = StaticCase(plan, torch.float32, (4, 2), [5])
    slots, key = torch.tensor(case.slots(0)), case.random(5, 2)
    quantized, half = make_plan(32, 64, torch.float32, quant="fp8"), key.bfloat16()
    for key_, value, plan_, message in (
        (half, key, plan, "keys and queries are torch.bfloat16"),
        (key, half, plan, "store_static: value is torch.bfloat16"),
        (key, key, quantized, "kv_cache is torch.float32 .* expected torch.uint8"),
        (key[:4], key, plan, "store_static: 5 slots for 4 keys"),
    ):
        with pytest.raises(ValueError, match=message):
            store_static(key_, value, case.kv_cache, slots, case.channels, plan_)
    with pytest.raises(ValueError, match=r"kv_cache has shape .* expected .num_blocks, Hk, 16"):
        attend(case, plan=make_plan(31, 64, torch.float32))
    with pytest.raises(ValueError, match=r"static_attention: block_table is torch.int64"):
        attend(case, block_table=case.block_table.long())
