"""The block manager inside vLLM's real KVCacheManager, against a model of the worker."""

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tests.support.block_engine import BLOCK, MAX_LEN, NUM_BLOCKS, Engine
from tests.support.block_worker import make_spec
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.spans import SpanRule
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.request_state import RequestRules

WINDOW = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=8
)
ACTIONS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 70), st.integers(1, 60)),
    st.tuples(st.just("arrive"), st.integers(1, 90), st.integers(1, 30), st.integers(0, 1)),
    # Requests with rules of their own.
    st.tuples(
        st.just("arrive"),
        st.integers(1, 90),
        st.integers(1, 60),
        st.sampled_from([None, 0, 1]),
        st.sampled_from([-1, -1, 0, 1, 4]),
    ),
    st.tuples(st.just("step"), st.sampled_from([1, 3, 8, 40])),
    st.tuples(st.just("step"), st.sampled_from([8, 40])),
    st.tuples(st.just("steps"), st.integers(2, 25)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("preempt"), st.integers(0, 9)),
    st.tuples(st.just("reset")),
)
FORMS = st.fixed_dictionaries(
    {
        "recent_window": st.sampled_from([0, 1, 5, 12]),
        "spans": st.sampled_from([(2, 1), (3, 2), (4, 3), (4, 1)]),
        "prune_decode": st.booleans(),
        "observation_window": st.sampled_from([0, 3, 9]),
        "mode": st.sampled_from(["thin", "dense", "prefill", "off", "evict", "evict-uncached"]),
        "in_flight_tokens": st.sampled_from([40, 120]),
        "budget_spans": st.integers(1, 3),
    }
)


def form_spec(form: dict[str, Any]) -> ThinKVCacheSpec:
    form = dict(form)
    spans, mode, budget = form.pop("spans"), form.pop("mode"), form.pop("budget_spans")
    evicts = mode.startswith("evict")
    if evicts and form["observation_window"] == 9:
        # Nothing but eviction: a thin block is a dense one.
        spans, form["prune_decode"] = (1, 1), False
    return make_spec(
        span_blocks=spans[0],
        thin_blocks=spans[1],
        thin_prefixes=mode in ("thin", "prefill"),
        delay_prompt=mode == "dense" or evicts,
        budget_spans=budget if evicts else None,
        prune_prefill=mode == "prefill",
        **form,
    )


def drive(engine: Engine, actions: list[tuple[Any, ...]]) -> None:
    assert isinstance(engine.manager.coordinator.single_type_managers[0], ThinKVCacheManager)
    for action, *arguments in actions:
        if action == "steps":
            for _ in range(arguments[0]):
                engine.step(20)
        else:
            getattr(engine, action)(*arguments)
        engine.check_ownership()
    engine.finish()
    assert engine.free_blocks == engine.num_blocks - 1


@settings(max_examples=300)
@given(actions=st.lists(ACTIONS, min_size=5, max_size=60), lag=st.integers(0, 2), form=FORMS)
def test_manager_frees_nothing_that_the_worker_reads_and_leaks_nothing(actions, lag, form):
    caching = form["mode"] not in ("off", "evict-uncached")
    drive(Engine(form_spec(form), lag, caching=caching), actions)


@settings(max_examples=150)
@given(actions=st.lists(ACTIONS, min_size=5, max_size=60), form=FORMS, caching=st.booleans())
def test_manager_of_requests_that_stay_dense_by_what_they_would_lose(actions, form, caching):
    # Decided at a prompt's end, and known to the scheduler before its next step.
    spec = replace(form_spec({**form, "mode": "dense"}), limits_loss=True)
    drive(Engine(spec, lag=0, caching=caching), actions)


def test_manager_frees_nothing_of_requests_that_are_not_resolved(monkeypatch):
    monkeypatch.setattr(ThinKVCacheManager, "resolve", lambda *_: None)
    for caching in (True, False):
        engine = Engine(make_spec(delay_prompt=True, limits_loss=True), lag=0, caching=caching)
        engine.arrive(prompt_len=41, max_tokens=8)
        with pytest.raises(RuntimeError, match="r0 are due, and its worker has not said"):
            engine.finish()


def test_requests_stay_as_they_were_resolved() -> None:
    engine = Engine(make_spec(delay_prompt=True, limits_loss=True), lag=0)
    for _ in range(2):
        engine.arrive(prompt_len=41, max_tokens=12)
    for preempted in (False, True):
        if preempted:
            for _ in range(2):
                engine.preempt(0)
        for _ in range(3):
            engine.step(90)
        (manager,) = engine.manager.coordinator.single_type_managers
        freed = {name: manager.held(name)[1] for name in ("r0", "r1")}
        assert sorted(engine.decisions.values()) == [False, True]
        assert freed == {name: 0 if dense else 3 for name, dense in engine.decisions.items()}
    engine.finish()
    gc.collect()
    assert not len(manager.rules)


@settings(max_examples=200)
@given(
    actions=st.lists(ACTIONS, min_size=5, max_size=60),
    lag=st.integers(0, 2),
    form=FORMS,
    thin_groups=st.integers(1, 2),
)
def test_manager_beside_groups_with_a_window(actions, lag, form, thin_groups):
    # Thin spans are not shared beside windows; nor are those of evicted prompts.
    mode = form["mode"] if form["mode"] == "evict" else "dense"
    spec = form_spec({**form, "mode": mode})
    others = [spec] * (thin_groups - 1) + [WINDOW]
    num_blocks = 30 * (thin_groups + 1)
    drive(Engine(spec, lag, caching=True, others=others, num_blocks=num_blocks), actions)


@pytest.mark.parametrize("prune_decode", [True, False])
def test_longest_request_of_a_pool_ends(prune_decode: bool) -> None:
    # With compaction at chunk ends the pool is smaller than the request is long.
    spec = make_spec(prune_prefill=True, prune_decode=prune_decode, in_flight_tokens=8)
    num_blocks = spec.max_blocks(MAX_LEN) + 1
    assert (num_blocks <= MAX_LEN // BLOCK) == prune_decode
    engine = Engine(spec, lag=0, chunk=8, num_blocks=num_blocks)
    request = engine.arrive(10, MAX_LEN)
    engine.finish()
    assert request.num_tokens == MAX_LEN - 1


@given(
    spans=st.sampled_from([(4, 1), (4, 3), (3, 2), (17, 3)]),
    recent=st.sampled_from([0, 5, 32]),
    in_flight=st.integers(1, 200),
)
def test_shorter_requests_fit_where_longer_ones_do(spans, recent, in_flight):
    # Else a shorter one waits for ever in a pool made for the longest.
    spec = make_spec(
        span_blocks=spans[0],
        thin_blocks=spans[1],
        recent_window=recent,
        prune_prefill=True,
        in_flight_tokens=in_flight,
    )
    most = [spec.max_blocks(length) for length in range(1, 600)]
    assert most == sorted(most)


@pytest.mark.parametrize("spans", [(3, 2), (1, 1)])
def test_manager_gives_all_blocks_of_evicted_spans_back(spans: tuple[int, int]) -> None:
    span_blocks, thin_blocks = spans
    shape = {"span_blocks": span_blocks, "thin_blocks": thin_blocks, "budget_spans": 1}
    spec = make_spec(**shape, delay_prompt=True, prune_decode=span_blocks > 1)
    engine = Engine(spec, lag=0)
    engine.arrive(prompt_len=41, max_tokens=8)
    engine.step(41)
    engine.step(1)  # compacts: (41 - 5) // 4 blocks of the prompt are old
    assert NUM_BLOCKS - 1 - engine.free_blocks == 11
    engine.step(1)
    old = 36 // 4 // span_blocks * span_blocks
    assert NUM_BLOCKS - 1 - engine.free_blocks == 11 - old + thin_blocks
    engine.finish()
    assert engine.free_blocks == NUM_BLOCKS - 1


@pytest.mark.parametrize("caching", [True, False])
def test_dense_request_keeps_all_its_blocks(caching: bool) -> None:
    engine = Engine(make_spec(), lag=0, caching=caching)
    for asks in (-1, None):
        engine.arrive(prompt_len=41, max_tokens=8, asks=asks)
    engine.step(82)
    engine.step(2)
    assert NUM_BLOCKS - 1 - engine.free_blocks == 11 + (11 - 3)
    (manager,) = engine.manager.coordinator.single_type_managers
    assert manager.held("r0") == (11, 0, 0)
    # Preempted and resumed, it is dense again; then nobody remembers it.
    engine.preempt(0)
    engine.step(82)
    engine.step(2)
    assert manager.held("r0") == (11, 0, 0)
    engine.finish()
    assert engine.free_blocks == NUM_BLOCKS - 1
    gc.collect()
    assert not len(manager.rules)


def test_dense_request_hits_what_is_exact() -> None:
    # 3 blocks of 4 tokens become 2. A pruned request leaves three thin spans, and exact blocks of
    # those tokens that were in the cache before: none.
    engine = Engine(make_spec(), lag=0, caching=True)
    first = engine.arrive(60, 2, tenant=1)
    engine.finish()
    dense = engine.arrive(60, 2, tenant=1, asks=-1)
    engine.finish()
    other = engine.arrive(60, 2, tenant=1, asks=-1)
    again = engine.arrive(60, 2, tenant=1)
    engine.finish()
    hits = [engine.hits[engine.name(request)] for request in (first, dense, other, again)]
    # 45 tokens are shared, 11 blocks. What the dense one left is as long as the thin spans and
    # the blocks behind them, and exact.
    assert hits == [0, 0, 44, 44]


def test_manager_that_prunes_a_dense_request_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the worker sees a manager that has not heard what a request asks for."""
    monkeypatch.setattr(RequestRules, "register", lambda *_: None)
    engine = Engine(make_spec(), lag=0)
    for asks in (-1, None, None):
        engine.arrive(prompt_len=41, max_tokens=20, asks=asks)
    with pytest.raises(AssertionError):
        engine.finish()


def test_hit_of_a_dense_request_on_thin_spans_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of the worker sees a dense request that was given thin spans."""
    engine = Engine(make_spec(), lag=0, caching=True)
    engine.arrive(60, 2, tenant=1)
    engine.finish()
    request = engine.arrive(60, 2, tenant=1, asks=-1)
    request.block_hashes = list(request.block_hashes)
    with pytest.raises(AssertionError):
        engine.finish()


def test_manager_frees_what_is_kept_is_noticed() -> None:
    """The model of the worker sees a manager that takes a kept span for an empty one."""

    class Greedy(SpanRule):
        def evicted_spans(self, prompt_len: int) -> int:
            return self.prompt_spans(prompt_len)

    engine = Engine(make_spec(budget_spans=1, delay_prompt=True), lag=0)
    manager = engine.manager.coordinator.single_type_managers[0]
    manager.rule = Greedy(4, 3, 2, 5, True, delay_prompt=True, budget_spans=1)
    for _ in range(4):
        engine.arrive(prompt_len=41, max_tokens=20)
    with pytest.raises(AssertionError):
        engine.finish()


def test_manager_frees_too_early_is_noticed() -> None:
    """The model of the worker sees a manager that is one token ahead."""

    class Hasty(SpanRule):
        def freeable_spans(self, prompt_len: int, processed_tokens: int, cached: int = 0) -> int:
            return self.prompt_spans(processed_tokens + 8)

    spec = make_spec()
    engine = Engine(spec, lag=0)
    engine.manager.coordinator.single_type_managers[0].rule = Hasty(**vars(spec.rule))
    for _ in range(4):
        engine.arrive(prompt_len=30, max_tokens=40)

    def run() -> None:
        for _ in range(200):
            engine.step(33)

    with pytest.raises(AssertionError):
        run()


def test_manager_rejects_a_prompt_that_grows() -> None:
    engine = Engine(make_spec(), lag=0)
    engine.arrive(prompt_len=41, max_tokens=8)
    engine.step(41)
    engine.step(1)
    (request,) = engine.running
    manager = engine.manager.coordinator.single_type_managers[0]
    with pytest.raises(NotImplementedError, match="grew from 41 to 50 tokens"):
        manager.remove_skipped_blocks(request.request_id, 42, 50)


def test_spec_merge_keeps_own_fields_and_rejects_disagreement() -> None:
    merged = ThinKVCacheSpec.merge([make_spec(), make_spec()])
    assert merged == make_spec()
    with pytest.raises(ValueError, match=r"differ in rule: .*_window=5.* and .*_window=6"):
        ThinKVCacheSpec.merge([make_spec(), make_spec(recent_window=6)])
