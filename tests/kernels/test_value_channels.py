"""Thin blocks that keep fewer value channels: compaction, decode and the choice, on the CPU."""

import numpy as np
import pytest
import torch

from tests.kernels.helpers import make_case, make_plan, random_channels
from tests.kernels.test_compaction import bits, make_cache
from tests.kernels.test_decode import check, contexts_of, run
from tests.kernels.test_decode_formats import mark_used
from think_vllm.kernels.cpu.compaction import compact_spans, read_channels
from think_vllm.kernels.cpu.scoring import add_query_energy
from think_vllm.kernels.reference.attention import decode_attention_ref
from think_vllm.kernels.reference.compaction import compact_spans_ref, dense_tokens, thin_run
from think_vllm.kernels.reference.scoring import (
    query_energy_ref,
    top_channels_ref,
    value_energy_ref,
)
from think_vllm.worker.channel_selection import top_channels

#: Every format, with and without pruned keys. 0.3 keeps 44 of 64 channels and 88 of 128: no whole
#: vectors, and groups that are not full.
PLANS = [
    (quant, *ratios)
    for quant in ("none", "fp8", "kivi4", "k4v2", "kivi2")
    for ratios in ((0.0, 0.3), (0.5, 0.5))
]
plans = pytest.mark.parametrize(("quant", "ratio", "value_ratio"), PLANS)


def pruned(head_size, dtype, quant, ratio, value_ratio, block_size=None, group=32):
    plan = make_plan(head_size, dtype, block_size, ratio, quant, group, value_ratio)
    assert plan.value_channels < head_size
    return plan


@plans
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "usual"), (torch.float32, "bits")])
@pytest.mark.parametrize("head_size", [64, 128])
def test_compact_spans_is_bit_exact(dtype, kind, head_size, quant, ratio, value_ratio):
    plan = pruned(head_size, dtype, quant, ratio, value_ratio)
    kv_cache, block_table = make_cache(plan, dtype, 2, 2, 2, gap_blocks=1)
    if kind == "usual":  # else random bits: all magnitudes, NaN and infinities
        generator = torch.Generator().manual_seed(2)
        kv_cache.copy_(torch.randn(kv_cache.shape, generator=generator))
    expected = kv_cache.clone()
    request, span = np.array([0, 1, 1], np.int32), np.array([1, 0, 1], np.int32)
    generator = torch.Generator().manual_seed(1)
    channels = torch.stack([random_channels(plan, 2, generator) for _ in request])
    if not plan.prunes_keys:
        channels[..., :head_size] = torch.arange(head_size)
    compact_spans_ref(expected, block_table, request, span, channels, plan)
    # Whole cache: other blocks, other layers and unused bytes must not change either.
    compact_spans(kv_cache, block_table, request, span, channels, plan)
    assert torch.equal(bits(kv_cache), bits(expected))
    assert torch.equal(read_channels(kv_cache, block_table, request, span, plan), channels)


@plans
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [64, 96, 128])
def test_decode(dtype, head_size, quant, ratio, value_ratio):
    plan = pruned(head_size, dtype, quant, ratio, value_ratio)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@pytest.mark.parametrize(
    ("head_size", "dtype", "quant", "ratio", "value_ratio", "block_size", "group"),
    [
        (80, torch.float32, "none", 0.5, 0.4, None, 32),
        (256, torch.bfloat16, "none", 0.0, 0.6, 16, 32),
        (64, torch.float16, "none", 0.5, 0.3, 48, 32),
        (64, torch.float32, "fp8", 0.5, 0.3, 128, 32),
        (128, torch.float32, "kivi4", 0.5, 0.3, 96, 64),
        (128, torch.float32, "k4v2", 0.0, 0.5, 32, 128),
        (128, torch.float32, "kivi2", 0.4, 0.8, 16, 64),
    ],
)
def test_decode_of_odd_sizes(head_size, dtype, quant, ratio, value_ratio, block_size, group):
    plan = pruned(head_size, dtype, quant, ratio, value_ratio, block_size, group)
    check(make_case(plan, dtype, 4, 2, contexts_of(plan)))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (16, 2)])
@pytest.mark.parametrize("quant", ["none", "k4v2"])
def test_decode_group_size(num_heads, num_kv_heads, quant):
    plan = pruned(64, torch.float32, quant, 0.5, 0.3)
    check(make_case(plan, torch.float32, num_heads, num_kv_heads, contexts_of(plan)))


@plans
def test_decode_random_contexts(quant, ratio, value_ratio):
    # Splits begin inside spans, and every span has tables of its own.
    plan = pruned(64, torch.float32, quant, ratio, value_ratio)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        contexts = []
        for _ in range(4):
            thin_spans = int(rng.integers(0, 12))
            tail = int(rng.integers(1, 3 * plan.span_tokens))
            contexts.append((thin_spans * plan.span_tokens + tail, thin_spans))
        check(make_case(plan, torch.float32, 4, 2, contexts, seed))


@plans
def test_decode_depends_on_neither_batch_nor_threads(quant, ratio, value_ratio):
    plan = pruned(64, torch.bfloat16, quant, ratio, value_ratio)
    contexts = [(30 * plan.span_tokens + 7, 30), (777 + 3 * plan.span_tokens, 3)]
    case = make_case(plan, torch.bfloat16, 16, 8, contexts)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run(case))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("quant", ["none", "k4v2"])
def test_pruned_channels_are_zero(quant):
    plan = pruned(64, torch.float32, quant, 0.5, 0.3)
    case = make_case(plan, torch.float32, 4, 2, [(plan.span_tokens, 1)])
    tables = read_channels(case.kv_cache, case.block_table, [0], [0], plan)[0]
    kept = torch.zeros(2, 64, dtype=torch.bool)
    kept.scatter_(1, tables[:, plan.key_channels :].long(), True)
    assert torch.equal(run(case)[0].view(2, 2, 64) != 0, kept[:, None].expand(2, 2, 64))


@plans
@pytest.mark.parametrize("padding", [0x00, 0xFF])
def test_decode_never_uses_padding(quant, ratio, value_ratio, padding):
    # 0xFF spells NaN as fp8, float16, bfloat16 and float32.
    plan = pruned(64, torch.float32, quant, ratio, value_ratio)
    case = make_case(plan, torch.float32, 4, 2, [(2 * plan.span_tokens + 9, 2)])
    before, layout = run(case), plan.layout
    for span in range(2):
        for k in range(plan.thin_blocks):
            tokens = min(plan.thin_block_tokens, plan.span_tokens - k * plan.thin_block_tokens)
            used = torch.zeros(layout.run_bytes, dtype=torch.uint8)
            mark_used(used, layout.keys, plan.key_channels, tokens)
            mark_used(used, layout.values, tokens, plan.value_channels)
            used[layout.table_offset : layout.value_table_offset + plan.value_channels] = 1
            for head in range(2):
                block = int(case.block_table[0, span * plan.span_blocks + k])
                thin_run(case.kv_cache, block, head)[used == 0] = padding
    assert torch.equal(run(case), before)


def test_decode_reads_the_value_tables():
    plan = pruned(64, torch.float32, "none", 0.5, 0.3)
    case = make_case(plan, torch.float32, 4, 2, [(2 * plan.span_tokens + 9, 2)])
    before = run(case)
    for k in range(plan.thin_blocks):
        block = int(case.block_table[0, plan.span_blocks + k])
        table = thin_run(case.kv_cache, block, 0)[plan.layout.value_table_offset :]
        table[: plan.value_channels] = table[: plan.value_channels].flip(0)
    assert not torch.allclose(run(case)[:, :2], before[:, :2], rtol=0, atol=1e-4)
    assert torch.equal(run(case)[:, 2:], before[:, 2:])


@pytest.mark.parametrize(("heads", "cap"), [((4, 2), 0.0), ((3, 3), 1.0)])
def test_value_channels_are_scored_by_the_outputs(heads, cap):
    # The long way, with attention weights, and what the server does.
    plan, length, window = make_plan(64, torch.float32), 90, 32
    case = make_case(plan, torch.float32, *heads, [(length, 0)])
    blocks = case.block_table[0, : -(-length // plan.block_size)].tolist()
    keys, values = dense_tokens(case.kv_cache, blocks, length)
    query = 3 * torch.randn(window, heads[0], 64, generator=torch.Generator().manual_seed(1))
    sinks = torch.linspace(-1, 2, heads[0])
    expected = value_energy_ref(query, keys, values, case.scale, cap, sinks)
    rows = [0] * window, range(length - window + 1, length + 1), [0] * window
    output = decode_attention_ref(
        query, case.kv_cache, case.block_table, *rows, plan, case.scale, cap, sinks
    )
    torch.testing.assert_close(query_energy_ref(output, heads[1]), expected)
    energy = torch.zeros(heads[1], 64)
    add_query_energy(output.float(), 0, window, energy)
    torch.testing.assert_close(energy.double() / window, expected, rtol=1e-5, atol=0)
    chosen = top_channels(energy[None], 44)
    assert torch.equal(chosen, top_channels_ref(expected[None], 44))
    # Not those of the largest values.
    by_size = values.square().mean(dim=1)
    assert not torch.equal(chosen, top_channels_ref(by_size[None], 44))
