import itertools

import numpy as np
import pytest
import torch

from tests.kernels.helpers import fill_dense_block, make_case, make_plan
from think_vllm.kernels.cpu.scoring import add_query_energy, key_energy
from think_vllm.kernels.reference.attention import decode_attention_ref
from think_vllm.kernels.reference.compaction import dense_tokens
from think_vllm.kernels.reference.scoring import (
    key_energy_ref,
    query_energy_ref,
    top_channels_ref,
    value_energy_ref,
)
from think_vllm.worker.channel_selection import top_channels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: A few hundred float32 roundings in another order; elements are converted exactly.
RTOL = 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (80, 48), (128, 128), (256, 32)])
def test_key_energy(dtype, head_size, block_size):
    plan = make_plan(head_size, dtype, block_size)
    case = make_case(plan, dtype, 2, 2, [(1, 0), (300, 0), (block_size, 0)], gap_blocks=1)
    request, prompt_len = np.array([1, 0, 2, 1]), np.array([300, 1, block_size, 77])
    actual = key_energy(case.kv_cache, case.block_table, request, prompt_len, plan)
    expected = key_energy_ref(case.kv_cache, case.block_table, request, prompt_len, plan)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_energy_of_the_blocks_behind_thin_ones(dtype):
    plan = make_plan(64, dtype, 16)
    case = make_case(plan, dtype, 2, 2, [(300, 0), (100, 0)])
    case.kv_cache[case.block_table[0, :5].long()] = torch.nan  # not keys of this form
    request, first, prompt_len = np.array([0, 1, 0]), np.array([5, 0, 18]), np.array([300, 77, 290])
    actual = key_energy(case.kv_cache, case.block_table, request, prompt_len, plan, first)
    assert actual.isfinite().all()
    expected = key_energy_ref(case.kv_cache, case.block_table, request, prompt_len, plan, first)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_energy_of_each_span(dtype):
    plan = make_plan(64, dtype, 16)
    case = make_case(plan, dtype, 2, 2, [(5 * plan.span_tokens, 0), (3 * plan.span_tokens, 0)])
    request, span = np.array([0, 0, 1, 0, 1]), np.array([3, 0, 2, 1, 0])
    end, first = (span + 1) * plan.span_tokens, span * plan.span_blocks
    actual = key_energy(case.kv_cache, case.block_table, request, end, plan, first)
    expected = key_energy_ref(case.kv_cache, case.block_table, request, end, plan, first)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


def test_key_energy_large_enough_for_threads():
    plan = make_plan(128, torch.bfloat16, 48)
    case = make_case(plan, torch.bfloat16, 4, 4, [(2500, 0), (801, 0)])
    request, prompt_len = np.array([0, 1]), np.array([2500, 801])
    actual = key_energy(case.kv_cache, case.block_table, request, prompt_len, plan)
    expected = key_energy_ref(case.kv_cache, case.block_table, request, prompt_len, plan)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (5, 1), (8, 1)])
def test_add_query_energy(dtype, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, num_heads + 3, 80, generator=generator).to(dtype)[:, :num_heads]
    energy = torch.zeros(num_kv_heads, 80)
    add_query_energy(query, 10, 42, energy)
    expected = 32 * query_energy_ref(query[10:42], num_kv_heads)
    torch.testing.assert_close(energy.double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("cuts", [[1], [31], [5, 6, 20], list(range(1, 32))], ids=str)
def test_add_query_energy_in_chunks_is_bit_equal(cuts):
    query = torch.randn(32, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, chunked = torch.zeros(2, 64), torch.zeros(2, 64)
    add_query_energy(query, 0, 32, whole)
    ends = [0, *cuts, 32]
    for begin, end in itertools.pairwise(ends):
        # Each chunk is a batch of its own, at another place.
        batch = torch.cat([torch.full((3, 6, 64), torch.nan).bfloat16(), query[begin:end]])
        add_query_energy(batch, 3, 3 + end - begin, chunked)
    assert torch.equal(chunked, whole)


def test_key_energy_by_hand():
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 1, 1, [(3, 0)])
    keys = torch.zeros(64, 3)
    keys[0] = torch.tensor([1.0, 2.0, 4.0])
    keys[63] = torch.tensor([-3.0, 0.0, 0.0])
    fill_dense_block(case.kv_cache, int(case.block_table[0, 0]), 3, plan,
                     lambda *shape: keys if shape[1] == 64 else torch.zeros(shape))  # fmt: skip
    energy = key_energy(case.kv_cache, case.block_table, np.zeros(1), np.full(1, 3), plan)
    assert energy.shape == (1, 1, 64)
    assert energy[0, 0, 0] == 7.0
    assert energy[0, 0, 63] == 3.0
    assert (energy[0, 0, 1:63] == 0).all()


@pytest.mark.parametrize("factor", [2.0**-6, 2.0**5])
def test_selection_ignores_rescaling(factor):
    """Queries / s and keys * s leave every logit, and so must leave the choice."""
    plan = make_plan(64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(32, 4, 64, generator=generator)
    scales = torch.ones(64)
    scales[torch.tensor([3, 35, 10, 42])] = factor  # RoPE pairs (i, i + 32)

    def choose(scale):
        case = make_case(plan, torch.float32, 4, 2, [(100, 0)])
        for entry in range(-(-100 // plan.block_size)):
            run = case.kv_cache[int(case.block_table[0, entry])].view(2, 2, -1)
            run[:, 0].view(2, 64, plan.block_size).mul_(scale[:, None])
        energy = torch.zeros(2, 64)
        add_query_energy(query / scale, 0, 32, energy)
        keys = key_energy(case.kv_cache, case.block_table, np.zeros(1), np.full(1, 100), plan)
        by_norm = keys.argsort(descending=True)[:, :, : plan.key_channels].sort().values
        return top_channels(energy * keys, plan.key_channels), by_norm

    (plain, plain_norm), (scaled, scaled_norm) = choose(torch.ones(64)), choose(scales)
    assert torch.equal(plain, scaled)
    assert not torch.equal(plain_norm, scaled_norm)  # the test can tell


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


def test_add_query_energy_rejects():
    query = torch.zeros(4, 6, 64)
    with pytest.raises(ValueError, match=r"add_query_energy: energy is torch\.float64"):
        add_query_energy(query, 0, 4, torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="6 heads, there are 4 KV heads"):
        add_query_energy(query, 0, 4, torch.zeros(4, 64))
    with pytest.raises(ValueError, match="tokens 0 to 5 of 4"):
        add_query_energy(query, 0, 5, torch.zeros(2, 64))
