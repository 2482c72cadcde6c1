import itertools

import pytest
import torch

from csrc_triton.scores import add_query_energy, key_energy
from tests.kernels.helpers import make_plan
from tests.triton.reference import key_energy_ref, make_case, split_dense
from think_vllm.kernels.reference.scoring import query_energy_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: A few hundred float32 roundings in another order; elements are converted exactly.
RTOL = 1e-5


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def energy_of(case, requests, prompt_lens, device, max_tokens=None, first_block=None):
    return key_energy(
        case.kv_cache.to(device), case.block_table.to(device), int32(requests, device),
        int32(prompt_lens, device), case.plan, max_tokens or max(prompt_lens),
        None if first_block is None else int32(first_block, device),
    ).cpu()  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_size", "block_size"), [(64, 16), (80, 48), (128, 128), (256, 32)])
def test_key_energy(device, dtype, head_size, block_size):
    plan = make_plan(head_size, dtype, block_size)
    # Everything but the prompts' tokens is NaN.
    case = make_case(plan, dtype, 2, 2, [(1, 0), (150, 0), (block_size, 0)], gap_blocks=1)
    requests, prompt_lens = [1, 0, 2, 1], [150, 1, block_size, 77]
    actual = energy_of(case, requests, prompt_lens, device)
    expected = key_energy_ref(case.kv_cache, case.block_table, requests, prompt_lens, plan)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


def test_key_energy_of_each_span(device):
    plan = make_plan(64, torch.bfloat16, 16)
    tokens = plan.span_tokens
    case = make_case(plan, torch.bfloat16, 2, 2, [(3 * tokens, 0), (2 * tokens, 0)])
    requests, spans = [0, 1, 0, 1], [2, 0, 0, 1]
    ends = [(span + 1) * tokens for span in spans]
    first = [span * plan.span_blocks for span in spans]
    actual = energy_of(case, requests, ends, device, tokens, first)
    expected = key_energy_ref(case.kv_cache, case.block_table, requests, ends, plan, first)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_key_energy_of_the_blocks_behind_thin_ones(device, dtype):
    plan = make_plan(64, dtype, 16)
    case = make_case(plan, dtype, 2, 2, [(300, 0), (100, 0)])
    case.kv_cache[case.block_table[0, :5].long()] = torch.nan  # not keys of this form
    requests, prompt_lens, first = [0, 1, 0], [300, 77, 290], [5, 0, 18]
    actual = energy_of(case, requests, prompt_lens, device, 300 - 5 * 16, first)
    assert actual.isfinite().all()
    expected = key_energy_ref(case.kv_cache, case.block_table, requests, prompt_lens, plan, first)
    torch.testing.assert_close(actual.double(), expected, rtol=RTOL, atol=0)


def test_key_energy_of_several_chunks_depends_on_the_prompt_alone(device):
    # Of 1024 tokens; among the prompts one that ends with a chunk, and some behind thin blocks.
    plan = make_plan(64, torch.bfloat16, 128)
    case = make_case(plan, torch.bfloat16, 1, 1, [(2050, 0), (1024, 0), (1025, 0)])
    tasks = [(0, 2050, 0), (1, 1024, 0), (2, 1025, 0), (0, 2050, 7), (0, 2050, 15), (2, 1025, 1)]
    requests, lengths, first = (list(x) for x in zip(*tasks, strict=True))
    together = energy_of(case, requests, lengths, device, 5000, first)
    expected = key_energy_ref(case.kv_cache, case.block_table, requests, lengths, plan, first)
    torch.testing.assert_close(together.double(), expected, rtol=RTOL, atol=0)
    for energy, (request, length, start) in zip(together, tasks, strict=True):
        alone = energy_of(case, [request], [length], device, length - start * 128, [start])
        assert torch.equal(energy, alone[0])


def test_key_energy_sees_every_key(device):
    """The comparison above would notice a single wrong key."""
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 1, 1, [(40, 0)])
    before = energy_of(case, [0], [40], device)[0, 0]
    keys, _ = split_dense(case.kv_cache)
    keys[int(case.block_table[0, 2]), 0, 7, 5] += 1.0  # channel 5 of token 39
    after = energy_of(case, [0], [40], device)[0, 0]
    assert (after != before).nonzero().tolist() == [[5]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (5, 1)])
def test_add_query_energy(device, dtype, num_heads, num_kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(50, num_heads + 3, 80, generator=generator).to(dtype)
    query[:10], query[45:], query[:, num_heads:] = torch.nan, torch.nan, torch.nan
    windows = [(10, 42), (42, 45), (3, 3)]
    energy = torch.full((3, num_kv_heads, 80), 0.5, device=device)
    begin, end = (int32(ends, device) for ends in zip(*windows, strict=True))
    add_query_energy(query.to(device)[:, :num_heads], begin, end, energy)
    for i, (first, last) in enumerate(windows):
        expected = torch.full((num_kv_heads, 80), 0.5, dtype=torch.float64)
        if last > first:
            part = query[first:last, :num_heads]
            expected += (last - first) * query_energy_ref(part, num_kv_heads)
        torch.testing.assert_close(energy[i].cpu().double(), expected, rtol=RTOL, atol=0)


@pytest.mark.parametrize("cuts", [[1], [31], [5, 6, 20]], ids=str)
def test_add_query_energy_in_chunks_is_bit_equal(device, cuts):
    query = torch.randn(32, 6, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole, chunked = torch.zeros(2, 1, 2, 64, device=device)
    add_query_energy(query.to(device), int32([0], device), int32([32], device), whole)
    for begin, end in itertools.pairwise([0, *cuts, 32]):
        # Each chunk is a batch of its own, at another place.
        batch = torch.cat([torch.full((3, 6, 64), torch.nan).bfloat16(), query[begin:end]])
        ends = int32([3], device), int32([3 + end - begin], device)
        add_query_energy(batch.to(device), *ends, chunked)
    assert torch.equal(chunked, whole)


def test_key_energy_without_prompts(device):
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 1, 1, [(3, 0)])
    assert energy_of(case, [], [], device, max_tokens=1).shape == (0, 1, 64)


def test_key_energy_rejects(device):
    plan = make_plan(64, torch.float32)
    case = make_case(plan, torch.float32, 1, 1, [(3, 0)])
    kv_cache, block_table = case.kv_cache.to(device), case.block_table.to(device)
    zero = int32([0], device)
    with pytest.raises(ValueError, match=r"key_energy: prompt_len is torch\.int32 .2,."):
        key_energy(kv_cache, block_table, zero, int32([3, 3], device), plan, 3)
    with pytest.raises(ValueError, match=r"key_energy: request is torch\.int64"):
        key_energy(kv_cache, block_table, zero.long(), zero, plan, 3)
    with pytest.raises(ValueError, match=r"key_energy: first_block is torch\.int64"):
        key_energy(kv_cache, block_table, zero, zero, plan, 3, zero.long())
    with pytest.raises(ValueError, match="max_tokens is 0; expected at least 1"):
        key_energy(kv_cache, block_table, zero, zero, plan, 0)
    with pytest.raises(ValueError, match="key_energy: block_table is"):
        key_energy(kv_cache, block_table.long(), zero, zero, plan, 3)


def test_add_query_energy_rejects(device):
    query, zero = torch.zeros(4, 6, 64, device=device), int32([0], device)
    with pytest.raises(ValueError, match=r"add_query_energy: energy is torch\.float64"):
        add_query_energy(query, zero, zero, torch.zeros(1, 2, 64, device=device).double())
    with pytest.raises(ValueError, match="query has 6 heads, there are 4 KV heads"):
        add_query_energy(query, zero, zero, torch.zeros(1, 4, 64, device=device))
    with pytest.raises(ValueError, match="there are 1 windows"):
        add_query_energy(query, zero, zero, torch.zeros(2, 2, 64, device=device))
    with pytest.raises(ValueError, match=r"expected .* .tokens, heads, 80."):
        add_query_energy(query, zero, zero, torch.zeros(1, 2, 80, device=device))
