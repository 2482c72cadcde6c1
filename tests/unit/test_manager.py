"""The block manager inside vLLM's real KVCacheManager, against a model of the worker."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.block_engine import BLOCK, NUM_BLOCKS, Engine
from think_vllm.blocks.manager import ThinKVCacheManager
from think_vllm.blocks.spec import ThinKVCacheSpec
from think_vllm.spans import SpanRule


def make_spec(**changes: Any) -> ThinKVCacheSpec:
    fields: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 1,
        "head_size": 8,
        "dtype": torch.float32,
        "span_blocks": 3,
        "thin_blocks": 2,
        "recent_window": 5,
        "prune_decode": True,
    }
    return ThinKVCacheSpec(**{**fields, **changes})


ACTIONS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 70), st.integers(1, 60)),
    st.tuples(st.just("arrive"), st.integers(1, 90), st.integers(1, 30), st.integers(0, 1)),
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
        "mode": st.sampled_from(["thin", "dense", "prefill", "off"]),
    }
)


def form_spec(form: dict[str, Any]) -> ThinKVCacheSpec:
    form = dict(form)
    spans, mode = form.pop("spans"), form.pop("mode")
    return make_spec(
        span_blocks=spans[0],
        thin_blocks=spans[1],
        thin_prefixes=mode in ("thin", "prefill"),
        delay_prompt=mode == "dense",
        prune_prefill=mode == "prefill",
        in_flight_tokens=120,
        **form,
    )


@settings(max_examples=300, deadline=None)
@given(
    actions=st.lists(ACTIONS, min_size=5, max_size=60),
    lag=st.integers(0, 2),
    form=FORMS,
)
def test_manager_frees_nothing_that_the_worker_reads_and_leaks_nothing(
    actions: list[tuple[Any, ...]], lag: int, form: dict[str, Any]
) -> None:
    engine = Engine(form_spec(form), lag, caching=form["mode"] != "off")
    assert isinstance(engine.manager.coordinator.single_type_managers[0], ThinKVCacheManager)
    for action, *arguments in actions:
        if action == "steps":
            for _ in range(arguments[0]):
                engine.step(20)
        else:
            getattr(engine, action)(*arguments)
        engine.check_ownership()
    engine.finish()
    assert engine.free_blocks == NUM_BLOCKS - 1


def test_manager_holds_what_the_plan_says() -> None:
    spec = make_spec()  # 3 blocks of 4 tokens become 2; 5 recent tokens stay dense
    engine = Engine(spec, lag=0)
    engine.arrive(prompt_len=41, max_tokens=8)
    engine.step(41)  # the prompt; (41 - 5) // 12 = 3 spans are thin afterwards
    engine.step(1)  # the next allocation frees their tails
    held = NUM_BLOCKS - 1 - engine.free_blocks
    assert held == 11 - 3


def test_manager_frees_too_early_is_noticed() -> None:
    """The model of the worker sees a manager that is one token ahead."""

    class Hasty(SpanRule):
        def freeable_spans(self, prompt_len: int, processed_tokens: int, cached: int = 0) -> int:
            return self.prompt_spans(processed_tokens + 8)

    spec = make_spec()
    engine = Engine(spec, lag=0)
    rule = spec.rule
    manager = engine.manager.coordinator.single_type_managers[0]
    manager.rule = Hasty(
        rule.block_size, rule.span_blocks, rule.thin_blocks, rule.recent_window, True
    )
    for _ in range(4):
        engine.arrive(prompt_len=30, max_tokens=40)

    def run() -> None:
        for _ in range(200):
            engine.step(33)

    with pytest.raises(AssertionError):
        run()


def test_manager_refuses_a_prompt_that_grows() -> None:
    engine = Engine(make_spec(), lag=0)
    engine.arrive(prompt_len=41, max_tokens=8)
    engine.step(41)
    engine.step(1)
    (request,) = engine.running
    manager = engine.manager.coordinator.single_type_managers[0]
    with pytest.raises(NotImplementedError, match="grew from 41 to 50 tokens"):
        manager.remove_skipped_blocks(request.request_id, 42, 50)


def test_spec_merge_keeps_own_fields_and_refuses_disagreement() -> None:
    merged = ThinKVCacheSpec.merge([make_spec(), make_spec()])
    assert merged == make_spec()
    with pytest.raises(ValueError, match="differ in recent_window: 5 and 6"):
        ThinKVCacheSpec.merge([make_spec(), make_spec(recent_window=6)])
