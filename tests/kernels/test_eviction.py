"""Which tokens are kept: against the reference, and both against the formulas as published."""

import math

import numpy as np
import pytest
import torch

from tests.kernels.helpers import make_case, make_plan
from think_vllm.kernels.reference.compaction import dense_tokens
from think_vllm.kernels.reference.eviction import (
    attention_sums_ref,
    gather_tokens_ref,
    pool_ref,
    select_tokens_ref,
)
from think_vllm.kernels.reference.quantization import code_and_back
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.worker.channel_selection import ChannelSelector
from think_vllm.worker.cpu.kernels import CPUKernels
from think_vllm.worker.device import Blocks
from think_vllm.worker.eviction_step import Accumulation, Repack
from think_vllm.worker.evictor import Evictor
from think_vllm.worker.policies import LayerHeads
from think_vllm.worker.step_tensors import PassTensors, Rows
from think_vllm.worker.step_writer import skip_evicted
from think_vllm.worker.token_selection import (
    add_attention,
    gather_tokens,
    pool,
    select_tokens,
    table_of_entries,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: A few hundred float32 roundings in another order; elements are converted exactly.
RTOL = 1e-5


def prompt(plan, dtype, num_heads, num_kv_heads, length, seed=0):
    """A dense prompt: the cache, its blocks, keys [Hk, L, D], and a query for each token."""
    case = make_case(plan, dtype, num_heads, num_kv_heads, [(length, 0)], seed, gap_blocks=1)
    blocks = case.block_table[0, : -(-length // plan.block_size)].long()
    keys, _ = dense_tokens(case.kv_cache, blocks.tolist(), length)
    generator = torch.Generator().manual_seed(seed + 1)
    query = torch.randn(length, num_heads, plan.head_size, generator=generator).to(dtype)
    return case, blocks, keys, query


def published_weights(query, keys, window):
    """Attention of the last queries as SnapKV and kvpress write it: [Hq, window, L]."""
    keys = keys.double().repeat_interleave(query.shape[1] // keys.shape[0], dim=0)
    scores = query[-window:].double().transpose(0, 1) @ keys.transpose(1, 2)
    scores = scores / math.sqrt(query.shape[2])
    mask = torch.full((window, window), float("-inf"), dtype=torch.float64).triu(1)
    scores[:, :, -window:] += mask
    return torch.softmax(scores, dim=-1)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_snapkv_keeps_what_the_published_formulas_keep(num_kv_heads):
    # One query head per KV head is the authors' case; groups are averaged as kvpress does.
    length, window, count = 300, 32, 90
    plan = make_plan(64, torch.float32, 16)
    _, _, keys, query = prompt(plan, torch.float32, 4, num_kv_heads, length)
    scores = published_weights(query, keys, window)[:, :, :-window].mean(dim=1)
    scores = torch.nn.functional.avg_pool1d(scores, kernel_size=7, padding=3, stride=1)
    scores = scores.view(num_kv_heads, -1, length - window).mean(dim=1)
    expected = scores.topk(count, dim=-1).indices.sort(dim=-1).values

    sums = attention_sums_ref(query[-window:], keys, length - window, 64**-0.5)
    assert torch.equal(select_tokens_ref(pool_ref(sums, length - window), count), expected)
    # Without the pooling other tokens are kept.
    assert not torch.equal(select_tokens_ref(sums[:, : length - window], count), expected)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_h2o_keeps_what_the_published_formula_keeps(num_kv_heads):
    length, recent, count = 200, 32, 60
    plan = make_plan(64, torch.float32, 16)
    _, _, keys, query = prompt(plan, torch.float32, 4, num_kv_heads, length)
    scores = published_weights(query, keys, length)[:, :, :-recent].sum(dim=1)
    scores = scores.view(num_kv_heads, -1, length - recent).mean(dim=1)
    expected = scores.topk(count, dim=-1).indices.sort(dim=-1).values
    sums = attention_sums_ref(query, keys, 0, 64**-0.5)
    assert torch.equal(select_tokens_ref(sums[:, : length - recent], count), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 2), (5, 1)])
@pytest.mark.parametrize(("first", "count"), [(0, 77), (64, 13), (76, 1), (48, 16)])
def test_add_attention(dtype, num_heads, num_kv_heads, first, count):
    plan = make_plan(80, dtype, 16)
    length = first + count
    case, blocks, keys, query = prompt(plan, dtype, num_heads, num_kv_heads, length)
    sums = torch.zeros(num_kv_heads, length + 9)
    add_attention(sums, query[first:], case.kv_cache, blocks, first, plan, 80**-0.5)
    expected = attention_sums_ref(query[first:], keys, first, 80**-0.5)
    torch.testing.assert_close(sums[:, :length].double(), expected, rtol=RTOL, atol=1e-9)
    assert not sums[:, length:].any()


def test_add_attention_in_chunks_and_tiles_with_sinks_and_a_cap(monkeypatch):
    plan = make_plan(64, torch.float32, 16)
    case, blocks, keys, query = prompt(plan, torch.float32, 4, 2, 100)
    options = {"logits_soft_cap": 2.0, "sinks": torch.linspace(-1, 3, 4)}
    expected = attention_sums_ref(query, keys, 0, 0.5, **options)
    for tile_scores in (1, 500, 1 << 22):
        monkeypatch.setattr("think_vllm.worker.token_selection.TILE_SCORES", tile_scores)
        sums = torch.zeros(2, 100)
        for begin, end in ((0, 7), (7, 64), (64, 100)):
            held = blocks[: -(-end // 16)]
            add_attention(sums, query[begin:end], case.kv_cache, held, begin, plan, 0.5, **options)
        torch.testing.assert_close(sums.double(), expected, rtol=RTOL, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 3, 40, 50])
def test_pool(num_tokens):
    sums = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    expected = pool_ref(sums.double(), num_tokens)
    torch.testing.assert_close(pool(sums, num_tokens).double(), expected, rtol=RTOL, atol=0)


def test_choose_tokens_by_hand():
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    assert select_tokens(scores, 1).tolist() == [[0], [0]]
    assert select_tokens(scores, 3).tolist() == [[0, 2, 3], [0, 1, 2]]
    assert torch.equal(select_tokens(scores, 3), select_tokens_ref(scores, 3))
    with pytest.raises(ValueError, match="count is 5; expected 1 to 4"):
        select_tokens(scores, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_tokens(dtype):
    plan = make_plan(64, dtype, 16)
    case, blocks, _, _ = prompt(plan, dtype, 4, 2, 160)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.stack([torch.randperm(160, generator=generator)[:48].sort()[0] for _ in "ab"])
    actual = gather_tokens(case.kv_cache, blocks, tokens, plan)
    expected = gather_tokens_ref(case.kv_cache, blocks.tolist(), tokens, plan)
    assert torch.equal(actual, expected)


def evicting_plan(dtype, ratio, quant, method="snapkv", budget=200):
    evicted = {"kv_evict": method, "kv_evict_budget": budget, "kv_observation_window": 20}
    pruned = {"kv_channel_prune": ratio, "kv_quant": quant}
    config = ThinkConfig.model_validate(pruned | evicted)
    plan = plan_blocks(config, 64, dtype.itemsize, 16)
    assert plan is not None
    return plan


def evict(evictor, plan: BlockPlan, case, query, cuts):
    """Watch a prompt in chunks, then repack it; the first span that holds what is kept."""
    length = len(query)
    window = 20 if plan.config.kv_evict == "snapkv" else length
    energy = query[-20:].float().square().mean(dim=0).view(2, 2, -1).mean(dim=1)[None]
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        chosen = max(begin, length - window)
        if end > chosen:
            seen = Accumulation(
                "a", 0, 3 + chosen - begin, 3 + end - begin, chosen, length,
                plan.rule.budget_spans, chosen == length - window,
            )  # fmt: skip
            batch = torch.cat([torch.full_like(query[:3], torch.nan), query[begin:end]])
            evictor.accumulate(batch, case.kv_cache, case.block_table, [seen], {0: energy}, {"a"})
    rule = plan.rule
    first = rule.evicted_spans(length)
    assert first > 0
    repack = Repack("a", 0, length, first, rule.budget_spans)
    selector = ChannelSelector(plan, LayerHeads(0, 0, 2, plan.head_size))
    evictor.repack(case.kv_cache, case.block_table, [repack], selector)
    assert not evictor._sums
    assert not evictor._kept
    return first


@pytest.mark.parametrize("method", ["snapkv", "h2o"])
@pytest.mark.parametrize(
    ("ratio", "quant"), [(0.0, "none"), (0.5, "none"), (0.5, "k4v2"), (0.0, "fp8")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_to_a_packed_prompt(method, ratio, quant, dtype):
    """From queries to decode attention, against the plain formula over each head's tokens."""
    plan = evicting_plan(dtype, ratio, quant, method)
    length = 32 + 5 * plan.span_tokens + 200 // plan.span_tokens * plan.span_tokens + 5
    case, blocks, keys, query = prompt(plan, dtype, 4, 2, length)
    _, values = dense_tokens(case.kv_cache, blocks.tolist(), length)
    evictor = Evictor(CPUKernels(plan, 0.125))
    before = case.kv_cache.clone()
    first = evict(evictor, plan, case, query, cuts=[length - 40, length - 8])

    rule = plan.rule
    spans = rule.prompt_spans(length)
    old, count = spans * plan.span_tokens, rule.budget_spans * plan.span_tokens
    window = 20 if method == "snapkv" else length
    scores = attention_sums_ref(query[-window:], keys, length - window, 0.125)
    if method == "snapkv":
        scores = pool_ref(scores, length - window)
    tokens = select_tokens_ref(scores[:, :old], count)

    # Nothing but the heads of the spans that hold something was written.
    heads = case.block_table[0, : spans * plan.span_blocks].view(spans, -1)[first:]
    heads = heads[:, : plan.thin_blocks].flatten().long()
    untouched = torch.ones(len(before), dtype=torch.bool)
    untouched[heads] = False
    as_bits = torch.int32 if dtype is torch.float32 else torch.int16
    now, then = (cache[untouched].contiguous().view(as_bits) for cache in (case.kv_cache, before))
    assert torch.equal(now, then)
    # Nobody reads the empty spans.
    case.block_table[0, : first * plan.span_blocks] = 0
    case.block_table[0, : spans * plan.span_blocks].view(spans, -1)[:, plan.thin_blocks :] = 0

    # Channels of a head: chosen over the keys that the prompt keeps.
    kept_keys = torch.cat(
        [torch.stack([keys[h, tokens[h]] for h in range(2)]), keys[:, old:]], dim=1
    )
    energy = query[-20:].double().square().mean(dim=0).view(2, 2, -1).mean(dim=1)
    ranked = (energy * kept_keys.double().square().mean(dim=1)).topk(plan.key_channels, dim=1)
    channels = ranked.indices.sort(dim=1).values

    numbers = (torch.tensor([x], dtype=torch.int32) for x in (0, length, spans))
    queries = PassTensors(None, Rows(slice(0, 1), *numbers), [])
    evicted = np.array([rule.evicted_spans(length)])
    rows = skip_evicted(rule, queries, evicted, case.block_table.stride(0)).rows
    table, out = table_of_entries(case.block_table), torch.empty_like(case.query)
    kernels = CPUKernels(plan, 0.125)
    kernels.attend_rows(case.query, Blocks(case.kv_cache, table), rows, out, length)
    for head in range(4):
        of = head // 2
        thin_keys, thin_values = code_spans(
            keys[of, tokens[of]], values[of, tokens[of]], channels[of], plan
        )
        every_key = torch.cat([thin_keys, keys[of, old:].double()])
        every_value = torch.cat([thin_values, values[of, old:].double()])
        weights = torch.softmax(every_key @ case.query[0, head].double() * 0.125, dim=0)
        expected = weights @ every_value
        tolerance = 1e-5 if dtype is torch.float32 else 2**-8
        torch.testing.assert_close(out[0, head].double(), expected, rtol=0, atol=tolerance)


def code_spans(keys, values, channels, plan):
    """What thin blocks hand back of packed tokens, at full width."""
    thin_keys = torch.zeros(keys.shape, dtype=torch.float64)
    thin_values = torch.zeros_like(thin_keys)
    for span in range(0, len(keys), plan.span_tokens):
        for begin in range(span, span + plan.span_tokens, plan.thin_block_tokens):
            part = slice(begin, min(begin + plan.thin_block_tokens, span + plan.span_tokens))
            quantized = keys[part][:, channels].T.contiguous()
            group = plan.config.kv_quant_group
            thin_keys[part][:, channels] = code_and_back(quantized, plan.format.keys, group, True).T
            thin_values[part] = code_and_back(values[part], plan.format.values, group)
    return thin_keys, thin_values


def test_evictor_forgets_requests_that_went_away():
    plan = evicting_plan(torch.float32, 0.5, "none")
    case, _, _, query = prompt(plan, torch.float32, 4, 2, 400)
    evictor = Evictor(CPUKernels(plan, 0.125))
    table = case.block_table
    half = Accumulation("gone", 0, 0, 10, 380, 400, plan.rule.budget_spans, True)
    evictor.accumulate(query, case.kv_cache, table, [half], {}, {"gone"})
    whole = Accumulation("here", 0, 380, 400, 380, 400, plan.rule.budget_spans, True)
    energy = {0: torch.ones(1, 2, 64)}
    evictor.accumulate(query, case.kv_cache, table, [whole], energy, {"gone", "here"})
    assert set(evictor._sums) == {"gone"}
    assert set(evictor._kept) == {"here"}
    evictor.accumulate(query, case.kv_cache, table, [], {}, set())
    assert not evictor._sums
    assert not evictor._kept
