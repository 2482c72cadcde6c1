import numpy as np
import pytest
import torch

from tests.kernels.helpers import FORMATS, bias_keys, make_plan, random_channels
from think_vllm.kernels.cpu.compaction import compact_spans, read_channels
from think_vllm.kernels.reference.compaction import (
    compact_spans_ref,
    read_channels_ref,
    split_dense,
)
from think_vllm.plan.layout import BlockForm


def make_cache(plan, dtype, num_kv_heads, num_requests, spans, seed=0, gap_blocks=0):
    """Random bits everywhere, NaN patterns included."""
    generator = torch.Generator().manual_seed(seed)
    width = spans * plan.span_blocks + 1
    num_blocks = num_requests * width + 3
    shape = (num_blocks, 1 + gap_blocks, num_kv_heads, plan.block_size, 2 * plan.head_size)
    data = torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), generator=generator)
    kv_cache = data.to(torch.uint8).view(dtype)[:, 0]
    blocks = torch.randperm(num_blocks, generator=generator)[: num_requests * width]
    return kv_cache, blocks.view(num_requests, width).to(torch.int32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("head_size", "block_size", "ratio"),
    [(64, 16, 0.5), (80, None, 0.5), (128, 48, 0.5), (128, 128, 0.5), (256, 32, 0.4),
     (128, None, 0.6)],
)  # fmt: skip
def test_compact_spans_is_bit_exact(dtype, head_size, block_size, ratio):
    plan = make_plan(head_size, dtype, block_size, ratio)
    kv_cache, block_table = make_cache(plan, dtype, 2, 2, 2, gap_blocks=1)
    expected = kv_cache.clone()
    request, span = np.array([0, 1, 1], np.int32), np.array([1, 0, 1], np.int32)
    generator = torch.Generator().manual_seed(1)
    channels = torch.stack([random_channels(plan, 2, generator) for _ in request])
    compact_spans_ref(expected, block_table, request, span, channels, plan)
    # Whole cache: other blocks, other layers and unused bytes must not change either.
    compact_spans(kv_cache, block_table, request, span, channels, plan)
    assert torch.equal(bits(kv_cache), bits(expected))
    tables = read_channels(kv_cache, block_table, request, span, plan)
    assert torch.equal(tables, channels)
    assert torch.equal(tables, read_channels_ref(kv_cache, block_table, request, span, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("quant", "ratio"), FORMATS)
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("kind", ["usual", "biased", "bits"])
def test_compact_spans_codes_to_the_bit(dtype, quant, ratio, head_size, kind):
    plan = make_plan(head_size, dtype, None, ratio, quant)
    kv_cache, block_table = make_cache(plan, dtype, 2, 2, 2)
    if kind != "bits":  # else random bits: all magnitudes, NaN and infinities
        generator = torch.Generator().manual_seed(2)
        size = torch.exp(2 * torch.randn(kv_cache.shape, generator=generator))
        kv_cache.copy_(torch.randn(kv_cache.shape, generator=generator) * size)
    if kind == "biased":
        bias_keys(split_dense(kv_cache, BlockForm.CPU)[0])
    expected = kv_cache.clone()
    request, span = np.array([0, 1, 1], np.int32), np.array([1, 0, 1], np.int32)
    generator = torch.Generator().manual_seed(1)
    channels = torch.stack([random_channels(plan, 2, generator) for _ in request])
    compact_spans_ref(expected, block_table, request, span, channels, plan)
    compact_spans(kv_cache, block_table, request, span, channels, plan)
    assert torch.equal(bits(kv_cache), bits(expected))
    tables = read_channels(kv_cache, block_table, request, span, plan)
    assert torch.equal(tables, channels)


@pytest.mark.parametrize("quant", ["kivi4", "k4v2", "kivi2"])
@pytest.mark.parametrize("group", [64, 128])
def test_compact_spans_quant_group(quant, group):
    plan = make_plan(128, torch.float32, None, 0.5, quant, group)
    kv_cache, block_table = make_cache(plan, torch.float32, 2, 1, 1)
    kv_cache.copy_(torch.randn(kv_cache.shape, generator=torch.Generator().manual_seed(1)))
    expected, zero = kv_cache.clone(), np.zeros(1, np.int32)
    channels = random_channels(plan, 2, torch.Generator().manual_seed(1))[None]
    compact_spans_ref(expected, block_table, zero, zero, channels, plan)
    compact_spans(kv_cache, block_table, zero, zero, channels, plan)
    assert torch.equal(bits(kv_cache), bits(expected))


def test_compact_spans_touches_only_its_layer():
    plan = make_plan(64, torch.bfloat16)
    kv_cache, block_table = make_cache(plan, torch.bfloat16, 2, 1, 1, gap_blocks=1)
    storage = torch.as_strided(
        kv_cache, (kv_cache.shape[0], 2, *kv_cache.shape[1:]), (
            kv_cache.stride(0), kv_cache.stride(0) // 2, *kv_cache.stride()[1:]))  # fmt: skip
    other = bits(storage[:, 1]).clone()
    channels = torch.arange(plan.key_channels, dtype=torch.uint8).expand(1, 2, -1)
    zero = np.zeros(1, np.int32)
    compact_spans(kv_cache, block_table, zero, zero, channels, plan)
    assert torch.equal(bits(storage[:, 1]), other)
    assert torch.equal(read_channels(kv_cache, block_table, zero, zero, plan), channels)


def test_compact_spans_large_enough_for_threads():
    plan = make_plan(128, torch.bfloat16, block_size=None)
    kv_cache, block_table = make_cache(plan, torch.bfloat16, 4, 3, 6)
    expected = kv_cache.clone()
    request = np.repeat(np.arange(3), 6).astype(np.int32)
    span = np.tile(np.arange(6), 3).astype(np.int32)
    generator = torch.Generator().manual_seed(1)
    channels = torch.stack([random_channels(plan, 4, generator) for _ in request])
    compact_spans(kv_cache, block_table, request, span, channels, plan)
    compact_spans_ref(expected, block_table, request, span, channels, plan)
    assert torch.equal(bits(kv_cache), bits(expected))


def test_compact_spans_without_tasks():
    plan = make_plan(64, torch.bfloat16)
    kv_cache, block_table = make_cache(plan, torch.bfloat16, 2, 1, 1)
    before = bits(kv_cache).clone()
    none = np.zeros(0, np.int32)
    channels = torch.zeros(0, 2, plan.key_channels, dtype=torch.uint8)
    compact_spans(kv_cache, block_table, none, none, channels, plan)
    assert torch.equal(bits(kv_cache), before)
    assert read_channels(kv_cache, block_table, none, none, plan).shape == channels.shape


def test_compact_spans_rejects_channels_of_another_plan():
    plan = make_plan(64, torch.bfloat16)
    kv_cache, block_table = make_cache(plan, torch.bfloat16, 2, 1, 1)
    zero = np.zeros(1, np.int32)
    channels = torch.zeros(1, 2, plan.key_channels + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="compact_spans: channels is"):
        compact_spans(kv_cache, block_table, zero, zero, channels, plan)


def test_compact_spans_rejects_uneven_tasks():
    plan = make_plan(64, torch.bfloat16)
    kv_cache, block_table = make_cache(plan, torch.bfloat16, 2, 1, 1)
    channels = torch.zeros(1, 2, plan.key_channels, dtype=torch.uint8)
    with pytest.raises(ValueError, match="compact_spans: request has shape"):
        compact_spans(
            kv_cache, block_table, np.zeros(1, np.int32), np.zeros(2, np.int32), channels, plan
        )
