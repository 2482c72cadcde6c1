import pytest
import torch

from csrc_triton.store import clear_tails, store_dense
from tests.kernels.helpers import make_plan
from tests.triton.reference import FORM, dense_tokens
from think_vllm.plan.layout import DenseLayout

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def random_bits(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Elements are moved, so NaN patterns must survive as well."""
    generator = torch.Generator().manual_seed(seed)
    last = shape[-1] * dtype.itemsize
    data = torch.randint(0, 256, (*shape[:-1], last), generator=generator, dtype=torch.uint8)
    return data.view(dtype)


def store_by_hand(key, value, kv_cache, slots, plan):
    """Write element by element, where the layout says."""
    layout = DenseLayout(plan.head_size, plan.block_size, plan.itemsize, FORM)
    channel = torch.arange(plan.head_size)
    runs = kv_cache.flatten(2)
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        block, place = divmod(slot, plan.block_size)
        for part, (of_token, of_channel), first in (
            (key, layout.key_strides, 0),
            (value, layout.value_strides, layout.values_offset // plan.itemsize),
        ):
            runs[block][:, first + place * of_token + channel * of_channel] = part[token]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (80, 48), (256, 32)])
def test_store_dense(device, dtype, head_size, block_size):
    plan = make_plan(head_size, dtype, block_size)
    num_blocks, num_heads, num_tokens = 5, 3, 37
    # One layer among others, heads among those of a fused projection.
    layers = random_bits(num_blocks, 2, num_heads, block_size, 2 * head_size, dtype=dtype, seed=0)
    fused = random_bits(2 * num_tokens, 3 * num_heads, head_size, dtype=dtype, seed=1)
    key, value = fused[::2, :num_heads], fused[::2, num_heads : 2 * num_heads]
    order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(2))
    slots = order[: num_tokens - 2].clone()  # two tokens of padding
    slots[[0, 7, 34]] = -1
    expected = layers.clone()
    store_by_hand(key, value, expected[:, 1], slots, plan)

    layers, fused = layers.to(device), fused.to(device)
    key, value = fused[::2, :num_heads], fused[::2, num_heads : 2 * num_heads]
    store_dense(key, value, layers[:, 1], slots.to(device), plan)
    assert torch.equal(bits(layers), bits(expected))


def test_store_dense_agrees_with_the_layout_that_references_read(device):
    plan = make_plan(64, torch.float32)
    key, value = torch.randn(2, 20, 2, 64, generator=torch.Generator().manual_seed(0))
    kv_cache = torch.full((3, 2, 16, 128), torch.nan, device=device)
    slots = torch.cat([torch.arange(32, 48), torch.arange(16, 20)])  # blocks 2, then 1
    store_dense(key.to(device), value.to(device), kv_cache, slots.to(device), plan)
    keys, values = dense_tokens(kv_cache.cpu(), [2, 1], 20)
    assert torch.equal(keys, key.transpose(0, 1))
    assert torch.equal(values, value.transpose(0, 1))


def test_store_dense_without_tokens(device):
    plan = make_plan(64, torch.float32)
    kv_cache = torch.zeros(1, 2, 16, 128, device=device)
    none = torch.zeros(0, 2, 64, device=device)
    store_dense(none, none, kv_cache, torch.zeros(0, dtype=torch.int64, device=device), plan)
    assert (kv_cache == 0).all()


def test_store_dense_rejects(device):
    plan = make_plan(64, torch.float32)
    kv_cache = torch.zeros(1, 2, 16, 128, device=device)
    rows, slots = torch.zeros(3, 2, 64, device=device), torch.zeros(3, device=device).long()
    with pytest.raises(ValueError, match=r"store_dense: kv_cache is .*; the plan is for blocks"):
        store_dense(rows, rows, torch.zeros(1, 2, 32, 128, device=device), slots, plan)
    with pytest.raises(ValueError, match=r"store_dense: value is torch\.float16"):
        store_dense(rows, rows.half(), kv_cache, slots, plan)
    with pytest.raises(ValueError, match=r"store_dense: key is .3, 1, 64., value is .3, 2, 64."):
        store_dense(rows[:, :1], rows, kv_cache, slots, plan)
    with pytest.raises(ValueError, match=r"slot_mapping is torch\.int32 .3,.*expected contiguous"):
        store_dense(rows, rows, kv_cache, slots.int(), plan)
    with pytest.raises(ValueError, match="slot_mapping has 3 slots; expected at most 2"):
        store_dense(rows[:2], rows[:2], kv_cache, slots, plan)
    with pytest.raises(ValueError, match="stride 2 being 1"):
        store_dense(torch.zeros(3, 2, 128, device=device)[:, :, ::2], rows, kv_cache, slots, plan)


@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (80, 48)])
def test_clear_tails(device, head_size, block_size):
    plan = make_plan(head_size, torch.bfloat16, block_size)
    shape = (8, 2, 3, block_size, 2 * head_size)
    layers = random_bits(*shape, dtype=torch.bfloat16, seed=0)
    table = torch.tensor([[3, 1], [5, 2], [6, 7], [0, 4]], dtype=torch.int32)
    # In a second block, to the end of a block, one token, and a row that pads a batch.
    lengths = [block_size + 5, 2 * block_size, 1, 0]
    expected = layers.clone()
    for row, length in enumerate(lengths):
        if length:
            block = int(table[row, (length - 1) // block_size])
            expected[block, 1, :, (length - 1) % block_size + 1 :, head_size:] = 0
    layers = layers.to(device)
    seq_len = torch.tensor(lengths, dtype=torch.int32, device=device)
    clear_tails(layers[:, 1], table.to(device), seq_len, plan)
    assert torch.equal(bits(layers), bits(expected))
    with pytest.raises(ValueError, match=r"clear_tails: seq_len is torch\.int32 .3,.*expected"):
        clear_tails(layers[:, 1], table.to(device), seq_len[:3], plan)


def test_store_rejects_what_wide_loads_cannot_use(device):
    plan = make_plan(64, torch.bfloat16)
    options = {"dtype": torch.bfloat16, "device": device}
    kv_cache, slots = torch.zeros(2, 1, 16, 128, **options), torch.arange(4, device=device)
    wide = torch.zeros(4, 2 * 65, **options)[:, :65].unflatten(1, (1, 65))[..., :64]
    with pytest.raises(ValueError, match=r"store_dense: key has strides .*multiples of 16"):
        store_dense(wide, wide, kv_cache, slots, plan)
    # A block of 2,048 elements, and 4 more: 8 bytes.
    kv_cache = torch.zeros(2, 2052, **options)[:, :2048].unflatten(1, (1, 16, 128))
    key = torch.zeros(4, 1, 64, **options)
    with pytest.raises(ValueError, match="store_dense: kv_cache has blocks 4104 bytes apart"):
        store_dense(key, key, kv_cache, slots, plan)
