"""Whole lives of requests on the CUDA backend, against undisturbed requests in plain torch."""

import random

import pytest
import torch

from csrc_triton.context import context_attention
from tests.support.tables import crossed
from tests.triton.lives import PLANS, Life
from tests.triton.reference import split_dense
from think_vllm.errors import ThinkError
from think_vllm.metrics.rank import take_report
from think_vllm.worker.cuda import kernels as cuda_kernels
from think_vllm.worker.cuda.backend import ThinkCUDABackend
from think_vllm.worker.state import GroupState


@crossed({"version": [1, 2], "name": list(PLANS)})
def test_lives_of_several_requests(name, version, device):
    life = Life(name, version, device, seed=version)
    span, due = life.plan.span_tokens, life.rule.due_position
    short = life.add("short", 7, due(0) + 4)
    long = life.add("long", 2 * span + 20, due(2) + 3)
    # A prompt in chunks, the last of which is shorter than the observation window.
    life.step(long=span, short=7)
    life.step(long=span + 16, short=1)
    life.step(long=4, short=1)
    assert long.computed == long.prompt_len
    life.step(long=1, short=1)
    # Both are preempted, then resumed: prompt and output in one chunk, or in several.
    life.engine.preempt(short)
    life.engine.preempt(long)
    life.step(long=due(2) - 1)
    life.step(short=5, long=1)
    assert long.freed_spans == 2
    life.step(short=due(0) - 6, long=1)  # the long one's third span is due
    life.step(short=1, long=1)
    life.step(short=1, long=1)  # and the short one's first, whose prompt had none
    life.engine.finish(long)
    other = life.add("other", span + 30, span + 33)
    life.step(other=span + 30, short=1)
    life.step(other=1, short=1)
    assert (short.freed_spans, other.freed_spans) == (1, 1)


@pytest.mark.parametrize("version", [1, 2])
def test_decode_batches_run_as_graphs_and_prompts_do_not(version, device):
    life = Life("k4v2-0.5", version, device, layers=2, graphs=True)
    engine, due = life.engine, life.rule.due_position
    life.add("first", 30, due(0) + 3)
    second = life.add("second", 1, due(0) + 3)
    life.step(first=29)
    life.step(first=1)  # one token, of a prompt
    life.step(first=1, second=1)
    assert engine.graph_steps == 0
    life.step(first=1, second=1)
    life.step(second=1)
    assert engine.graph_steps == 2
    # Resumed to where its first span is about to be due, so that it is compacted ahead of a graph.
    engine.preempt(second)
    life.step(second=due(0) - 1)
    life.decode(3, "first", "second")
    assert engine.graph_steps == 5
    life.step(second=1)
    assert second.freed_spans == 1


@crossed({"version": [1, 2], "name": ["none-0.5-values-0.3", "k4v2-0.5"]})
def test_dense_request_beside_pruned_ones(name, version, device):
    life = Life(name, version, device, graphs=True, seed=version)
    span, due = life.plan.span_tokens, life.rule.due_position
    length = 2 * span + 20
    dense = life.add("dense", length, due(2) + 3, kv_channel_prune=False)
    pruned = life.add("pruned", length, due(2) + 3)
    # A prompt in chunks, the last of which is shorter than the observation window.
    life.step(dense=span, pruned=length)
    life.step(dense=span + 16, pruned=1)
    life.step(dense=4, pruned=1)
    before = life.engine.graph_steps
    life.step(dense=1, pruned=1)
    # They decode in one graph.
    assert life.engine.graph_steps == before + 1
    life.engine.preempt(dense)
    life.engine.preempt(pruned)
    life.step(pruned=due(2) - 1)
    life.step(dense=due(2) - 1, pruned=1)
    life.step(dense=1, pruned=1)
    life.step(dense=1)
    assert (dense.freed_spans, len(dense.gone)) == (0, 0)
    assert pruned.freed_spans == 2
    # Nobody keeps channels for it, or has counted any.
    requests = life.engine.builder.state.requests
    assert requests.get("pruned") >= 0
    with pytest.raises(KeyError):
        requests.get("dense")


@pytest.mark.parametrize("version", [1, 2])
def test_spans_that_fill_while_decoding_can_stay_dense(version, device):
    life = Life("k4v2-0.5", version, device, kv_prune_decode=False)
    span, due = life.plan.span_tokens, life.rule.due_position
    request = life.add("one", span + 20, due(1) + 3)
    life.step(one=due(1) - 1)
    life.decode(3, "one")
    assert request.freed_spans == 1


def test_windows_of_many_prompts_can_be_cut_at_once(device, monkeypatch):
    monkeypatch.setattr(GroupState, "CUT_WINDOWS", 1)
    life = Life("k4v2-0.5", 2, device)
    for i in range(3):
        life.add(f"r{i}", 60, 62)
    life.step(r0=55, r1=51, r2=30)
    life.step(r0=2, r2=25)
    life.step(r2=1)
    life.engine.preempt(life.engine.requests["r1"])
    life.step(r0=3, r1=52)
    life.step(r0=1, r1=8, r2=4)
    life.step(r0=1, r1=1, r2=1)
    assert life.engine.builder.state.windows.capacity == 4
    # Each of the three prompts has ended once, and chosen channels for each head.
    report = take_report()
    assert report is not None
    assert sum(report["shares"][0]) == 3 * life.engine.heads[1]


@pytest.mark.parametrize("seed", range(4))
def test_lives_at_random(seed, device):
    choose = random.Random(seed)
    # Compacted one step later, prompts answer the same.
    later = "dense" if seed in (1, 2) else "thin"
    options = {"graphs": seed > 1, "seed": seed, "kv_prefix_cache": later}
    life = Life("k4v2-0.5", 1 + seed % 2, device, **options)
    engine = life.engine
    for i in range(4):
        prompt = choose.randrange(1, 130)
        life.add(f"r{i}", prompt, prompt + choose.randrange(2, 8))
    while engine.requests:
        work = {}
        for name, request in list(engine.requests.items()):
            left = request.total - request.computed
            if left == 0:
                engine.finish(request)
            elif request.computed > request.prompt_len and choose.random() < 0.05:
                engine.preempt(request)
            elif choose.random() < 0.8:
                known = max(request.prefill_len - request.computed, 1)
                work[name] = min(known, choose.choice([1, 9, 40, 200]))
        if work:
            life.step(**work)


@pytest.mark.parametrize("version", [1, 2])
def test_dummy_runs_have_no_consequences(version, device):
    life = Life("none-0.5", version, device)
    engine, plan = life.engine, life.plan
    life.add("one", 40, 42)
    life.step(one=36)
    cache, state = engine.layers[0].kv_cache, engine.builder.state
    cache[0] = 0
    before = [x.clone() for x in (cache, state.energy, state.channels)]
    metadata = engine.dummy(rows=3, tokens=5)
    query = torch.randn(15, *(engine.heads[0], plan.head_size), device=device)
    key = torch.randn(15, *(engine.heads[1], plan.head_size), device=device)
    out = torch.full_like(query, torch.nan)
    layer = engine.layers[0]
    layer.impl.forward(layer, query, key, key, cache, metadata, out)
    assert torch.isfinite(out).all()
    after = (cache, state.energy, state.channels)
    assert all(
        torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(before, after, strict=True)
    )
    life.step(one=4)
    life.step(one=1)


def test_profiling_runs_have_no_metadata(device):
    life = Life("fp8", 2, device)
    layer = life.engine.layers[0]
    query = torch.randn(3, 2, 64, device=device)
    out = torch.full_like(query, torch.nan)
    layer.impl.forward(layer, query, query, query, torch.empty(0), None, out)
    assert not out.any()


def count_launches(monkeypatch) -> list[bool]:
    """Whether each launch of our context kernel from now on reads thin blocks."""
    launches = []

    def context(*arguments, thin_spans, **options):
        launches.append(thin_spans is not None)
        return context_attention(*arguments, thin_spans=thin_spans, **options)

    monkeypatch.setattr(cuda_kernels, "context_attention", context)
    return launches


@pytest.mark.parametrize("version", [1, 2])
def test_prompts_over_dense_blocks_run_in_flash_attention(version, device, monkeypatch):
    launches = count_launches(monkeypatch)
    life = Life("k4v2-0.5", version, device)
    flash = life.engine.flash
    assert flash is not None
    one = life.add("one", 60, 75)
    life.add("two", 20, 22)
    life.add("three", 70, 72)
    life.step(one=60, two=20)
    life.step(one=1, two=1, three=31)
    assert [sorted(x) for x in flash.fresh] == [[20, 60], [31]]
    # A prompt that goes on reads its earlier chunks as pages.
    life.step(one=1, three=39)
    assert flash.paged == [[(39, 70)]]
    # A resumed request's output sees its first span thin, its prompt does not.
    life.engine.preempt(one)
    assert launches == []
    life.step(one=74, two=1, three=1)
    assert flash.fresh[2:] == [[60]]
    assert launches == [True]
    life.step(one=1)
    # So does a prompt behind thin blocks. One without, in the same step, does not.
    four = life.add("four", 66, 67, hit=(one, life.plan.span_tokens))
    life.add("five", 50, 52)
    life.step(five=17)
    life.step(four=18, five=33)
    assert four.computed == four.prompt_len
    assert flash.fresh[3:] == [[17]]
    assert flash.paged[1:] == [[(33, 50)]]
    assert launches == [True, True]


@pytest.mark.parametrize("version", [1, 2])
def test_outputs_that_are_computed_again_run_in_flash_attention(version, device, monkeypatch):
    launches = count_launches(monkeypatch)
    life = Life("none-0.5", version, device)
    flash = life.engine.flash
    assert flash is not None
    length = life.rule.due_position(0) - 6
    young = life.add("young", length, length + 20)
    old = life.add("old", length, length + 20)
    life.step(young=length, old=length)
    for i in range(9):
        life.step(old=1, **({"young": 1} if i < 4 else {}))
    life.engine.preempt(young)
    life.engine.preempt(old)
    flash.paged.clear()
    launches.clear()
    life.step(young=length + 4, old=length + 9)
    # Those that see no thin span, of both requests, then the old one's others.
    assert [sorted(x) for x in flash.paged] == [[(4, length + 4), (6, length + 6)]]
    assert launches == [True]
    life.step(young=1, old=1)


def test_what_lies_behind_a_context_is_cleared_for_flash_attention(device):
    life = Life("fp8", 2, device)
    # Blocks hold NaN when they are begun, as recycled ones may.
    request = life.add("one", 45, 48)
    life.step(one=20)
    life.step(one=15)
    cache = life.engine.layers[0].kv_cache
    _, values = split_dense(cache)
    block = request.blocks[2]
    assert values[block].isfinite().all()
    assert not values[block, :, 3:].any()
    life.step(one=10)
    life.step(one=1)


@pytest.mark.parametrize("version", [1, 2])
def test_lives_without_flash_attention(version, device, monkeypatch):
    launches = count_launches(monkeypatch)
    life = Life("none-0.5", version, device, flash=False)
    span, due = life.plan.span_tokens, life.rule.due_position
    long = life.add("long", span + 40, due(1) + 3)
    life.step(long=span)
    life.step(long=36)
    life.step(long=4)
    life.step(long=1)
    assert launches == [False] * 3
    life.engine.preempt(long)
    life.step(long=due(1) + 2)
    life.step(long=1)
    assert launches == [False] * 4 + [True] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alibi_slopes": [0.5, 0.25]}, "ALiBi"),
        ({"sliding_window": 128}, "a sliding window"),
        ({"sinks": torch.zeros(2)}, "attention sinks"),
        ({"kv_sharing_target_layer_name": "other"}, "shared between layers"),
        ({"attn_type": "encoder"}, "of type encoder"),
        ({"kv_cache_dtype": "fp8"}, "KV cache of dtype fp8"),
        ({"chunk_lookback": 3}, "unknown here: chunk_lookback"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_layers_that_cannot_be_served_are_rejected(options, message):
    with pytest.raises(ThinkError, match=message):
        ThinkCUDABackend.get_impl_cls()(2, 64, 0.1, **options)
