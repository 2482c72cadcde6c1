"""What an engine reports of its pool, over the lives of requests in vLLM's real block manager."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.block_engine import NUM_BLOCKS, Engine
from tests.support.block_worker import make_spec
from tests.unit.scheduler.test_manager import ACTIONS
from think_vllm.metrics.catalog import BLOCKS, BYTES, HELD, HITS, MULTIPLE, SPANS
from think_vllm.scheduler.report import LOOK_SECONDS, EngineReport

BLOCK_BYTES = 1000
IDLE = {HELD: {"dense": 0, "thin": 0}, MULTIPLE: {"": 0.0}}


class Reports:
    """Reports of a model of vLLM's scheduler, and the clock that they go by."""

    def __init__(self, engine: Engine) -> None:
        self.now = 100.0
        self.report = EngineReport(
            lambda: engine.running,
            engine.manager.coordinator.single_type_managers,
            BLOCK_BYTES,
            {},
            lambda: self.now,
        )

    def take(self) -> dict[str, Any]:
        return self.report.take(None) or {}


def test_report_counts_what_a_request_gives_back() -> None:
    engine = Engine(make_spec(), lag=0)  # 3 blocks of 4 tokens become 2; 5 recent tokens stay
    reports = Reports(engine)
    assert reports.take() == {"gauges": IDLE}
    assert reports.take() == {}
    engine.arrive(prompt_len=41, max_tokens=30)
    engine.step(41)
    # Nothing has been freed yet; the first look comes at once.
    assert reports.take() == {"gauges": {HELD: {"dense": 41, "thin": 0}, MULTIPLE: {"": 1.0}}}
    engine.step(1)
    freed = {SPANS: 3, BLOCKS: 3, BYTES: 3 * BLOCK_BYTES}
    assert reports.take() == {"counters": freed}
    reports.now += LOOK_SECONDS
    # 42 tokens need 11 blocks; 3 are gone.
    assert reports.take() == {
        "gauges": {HELD: {"dense": 42 - 36, "thin": 36}, MULTIPLE: {"": 11 / 8}}
    }
    while engine.running:
        engine.step(1)
    # Tokens 48 and 60 end spans. The last token is sampled and not computed: 70 tokens.
    assert reports.take() == {
        "counters": {SPANS: 2, BLOCKS: 2, BYTES: 2 * BLOCK_BYTES},
        "gauges": IDLE,
    }
    assert engine.free_blocks == NUM_BLOCKS - 1


def test_report_counts_tokens_hit_thin() -> None:
    engine = Engine(make_spec(observation_window=3), lag=0, caching=True)
    reports = Reports(engine)
    for hit in (0, 36):  # three quarters of the prompt, 45 tokens, hold 3 spans
        engine.arrive(60, 2, tenant=1)
        engine.finish()
        assert reports.take()["counters"].get(HITS, 0) == hit


def test_report_counts_evicted_spans() -> None:
    engine = Engine(make_spec(budget_spans=1, delay_prompt=True), lag=0)
    reports = Reports(engine)
    engine.arrive(41, 8)
    for count in (41, 1, 1):
        engine.step(count)
    reports.now += LOOK_SECONDS
    report = reports.take()
    # 3 old spans of 3 blocks: two are empty, and one gives a block back.
    assert (report["counters"][SPANS], report["counters"][BLOCKS]) == (3, 7)
    assert report["gauges"][HELD] == {"dense": 43 - 36, "thin": 12}
    assert report["gauges"][MULTIPLE] == {"": 11 / 4}


def test_report_goes_along_with_that_of_a_rank() -> None:
    engine = Engine(make_spec(), lag=0)
    reports = Reports(engine)
    measured = {"counters": {"compaction_seconds": 0.5}, "shares": [[1.0], [0.9]]}
    report = reports.report.take(dict(measured))
    assert report == {**measured, "gauges": IDLE}
    assert reports.report.take(dict(measured)) == measured


@settings(max_examples=100)
@given(actions=st.lists(ACTIONS, min_size=5, max_size=40), lag=st.integers(0, 2))
def test_reports_add_up_over_random_lives(actions: list[tuple[Any, ...]], lag: int) -> None:
    engine = Engine(make_spec(observation_window=3), lag, caching=True)
    reports = Reports(engine)
    (manager,) = engine.manager.coordinator.single_type_managers
    freed_rows = 0
    remove = manager._remove_blocks_in_range

    def count_rows(request_id: str, first: int, last: int) -> None:
        nonlocal freed_rows
        freed_rows += sum(
            not block.is_null for block in manager.req_to_blocks[request_id][first:last]
        )
        remove(request_id, first, last)

    manager._remove_blocks_in_range = count_rows
    sums: dict[str, float] = {}
    for action, *arguments in [*actions, ("finish",)]:
        if action == "steps":
            for _ in range(arguments[0]):
                engine.step(20)
        else:
            getattr(engine, action)(*arguments)
        reports.now += LOOK_SECONDS
        report = reports.take()
        for name, more in report.get("counters", {}).items():
            sums[name] = sums.get(name, 0) + more
        held = report.get("gauges", IDLE)[HELD]
        tokens = sum(request.num_computed_tokens for request in engine.running)
        assert sum(held.values()) == tokens
        assert min(held.values()) >= 0
        if not engine.running:
            assert report.get("gauges", IDLE) == IDLE
    assert sums.get(BLOCKS, 0) == freed_rows == sums.get(SPANS, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_report_looks_at_requests_twice_a_second_only(count: int) -> None:
    engine = Engine(make_spec(), lag=0)
    looks = 0

    def running() -> list[Any]:
        nonlocal looks

        class Looked(list[Any]):
            def __iter__(self) -> Any:
                nonlocal looks
                looks += 1
                return super().__iter__()

        return Looked(engine.running)

    now = 100.0
    managers = engine.manager.coordinator.single_type_managers
    report = EngineReport(running, managers, BLOCK_BYTES, {}, lambda: now)
    for _ in range(count):
        engine.arrive(prompt_len=20, max_tokens=20)
    engine.step(60)
    for _ in range(10):
        engine.step(count)
        report.take(None)
    assert looks == 1
    now += LOOK_SECONDS
    report.take(None)
    assert looks == 2
