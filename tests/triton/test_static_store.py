"""Triton's store into static blocks: the reference's bytes, and no others."""

import pytest
import torch

from csrc_triton.static_blocks import order_channels
from csrc_triton.static_store import store_static
from tests.support.static_blocks import KEPT, QUANTS, StaticCase, make_plan
from think_vllm.kernels.reference.static import read_run, store_static_ref
from think_vllm.kernels.static_cache import StaticChannels

ROWS = [(kept, torch.bfloat16) for kept in KEPT]
ROWS += [((31, 48), torch.float16), ((31, 48), torch.float32), ((64, 64), torch.bfloat16)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities and NaN, in numpy
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("kept", "dtype"), ROWS, ids=str)
def test_store_static_writes_the_reference_bytes(device, kept, dtype, quant):
    plan = make_plan(*kept, dtype, quant=quant)
    # One layer among others, heads among those of a fused projection.
    case = StaticCase(plan, dtype, (4, 2), [37, 16, 1], gap_blocks=1)
    fused = case.random(2 * 60, 6)
    fused[6], fused[8] = 0.0, 1e-38
    fused[14, 0, 1], fused[16, 3, 2] = torch.inf, torch.nan
    slots = [slot for request in range(3) for slot in case.slots(request)]
    slots[5] = -1  # and six tokens of padding behind
    expected = case.kv_cache.clone()
    store_static_ref(fused[::2, :2], fused[::2, 2:4], expected, slots, *case.kept_lists(), plan)
    fused, written = fused.to(device), case.kv_cache.to(device)
    order = order_channels(case.channels, plan.head_size, device)
    store_static(
        fused[::2, :2], fused[::2, 2:4], written, torch.tensor(slots, device=device), order, plan
    )
    assert torch.equal(written.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(("head_size", "block_size"), [(80, 48), (256, 128)])
@pytest.mark.parametrize("quant", QUANTS)
def test_store_static_of_other_sizes(device, quant, head_size, block_size):
    plan = make_plan(40, 72, torch.bfloat16, block_size, head_size, quant)
    case = StaticCase(plan, torch.bfloat16, (2, 1), [block_size + 1])
    key, value = case.random(block_size + 1, 1), case.random(block_size + 1, 1)
    slots = case.slots(0)
    store_static_ref(key, value, case.kv_cache, slots, *case.kept_lists(), plan)
    written = case.kv_cache.to(device).view(torch.uint8)
    written[:, :, :, 0] ^= 1
    order = order_channels(case.channels, head_size, device)
    given = (key.to(device), value.to(device), written.view(case.kv_cache.dtype))
    store_static(*given, torch.tensor(slots, device=device), order, plan)
    for entry, held in ((0, block_size), (1, 1)):
        block = int(case.block_table[0, entry])
        for one, other in zip(
            read_run(written.view(case.kv_cache.dtype).cpu(), block, 0, plan),
            read_run(case.kv_cache, block, 0, plan),
            strict=True,
        ):
            one, other = (x if x.shape[0] != plan.key_channels else x.T for x in (one, other))
            assert torch.equal(one[:held], other[:held])


def test_order_puts_pruned_channels_behind_kept_ones(device):
    kept = torch.tensor([[1, 2, 5], [0, 3, 4]])
    order = order_channels(StaticChannels(kept, kept.flip(0)), 6, device)
    assert order.keys.tolist() == [[1, 2, 5, 0, 3, 4], [0, 3, 4, 1, 2, 5]]
    assert order.values.tolist() == [[0, 3, 4, 1, 2, 5], [1, 2, 5, 0, 3, 4]]
    assert order.keys.dtype == torch.int32


def test_store_static_without_tokens(device):
    case = StaticCase(make_plan(32, 64, torch.float32), torch.float32, (4, 2), [5])
    none = torch.zeros(0, 2, 64, device=device)
    order = order_channels(case.channels, 64, device)
    slots = torch.zeros(0, dtype=torch.int64, device=device)
    store_static(none, none, case.kv_cache.to(device), slots, order, case.plan)


def test_store_static_rejects(device):
    plan = make_plan(32, 64, torch.float32)
    case = StaticCase(plan, torch.float32, (4, 2), [3])
    kv_cache, key = case.kv_cache.to(device), case.random(3, 2).to(device)
    slots = torch.tensor(case.slots(0), device=device)
    order = order_channels(case.channels, 64, device)
    quantized = make_plan(32, 64, torch.float32, quant="fp8")
    wide = torch.zeros(3, 2, 128, device=device)[:, :, ::2]
    for key_, value, slots_, order_, plan_, message in (
        (key.bfloat16(), key, slots, order, plan, "keys and queries are torch.bfloat16"),
        (key, key.half(), slots, order, plan, "value is torch.float16"),
        (wide, key, slots, order, plan, "stride 2 being 1"),
        (key[:, :1], key, slots, order, plan, "key is .3, 1, 64., value is .3, 2, 64."),
        (key[:2], key[:2], slots, order, plan, "3 slots; expected at most 2"),
        (key, key, slots.int(), order, plan, "slot_mapping is torch.int32"),
        (key, key, slots, order, quantized, "kv_cache is torch.float32 .* expected torch.uint8"),
        (key, key, slots, order._replace(keys=order.keys[:, :32]), plan, "order.keys is"),
        (key, key, slots, order._replace(values=order.values.long()), plan, "order.values is"),
    ):
        with pytest.raises(ValueError, match=f"store_static: .*{message}"):
            store_static(key_, value, kv_cache, slots_, order_, plan_)
