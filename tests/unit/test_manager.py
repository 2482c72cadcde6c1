"""The block manager inside vLLM's real KVCacheManager, against a model of the worker.

The model writes a tag into every block that the worker would write, and checks the tag of
every block that the worker would read. A block freed too early, handed out twice or never
given back makes a tag wrong or a count short.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from think_vllm.blocks.manager import ThinKVCacheManager
from think_vllm.blocks.spec import ThinKVCacheSpec
from think_vllm.spans import SpanRule

BLOCK = 4
NUM_BLOCKS = 40
MAX_LEN = 100


def make_manager(spec: FullAttentionSpec) -> KVCacheManager:
    config = KVCacheConfig(
        num_blocks=NUM_BLOCKS,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )
    return KVCacheManager(
        config,
        max_model_len=MAX_LEN,
        scheduler_block_size=BLOCK,
        hash_block_size=BLOCK,
        enable_caching=False,
    )


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


@dataclass
class Worker:
    """Contents of every block, and what each request's row says."""

    rule: SpanRule
    memory: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    thin: dict[str, int] = field(default_factory=dict)

    def run(self, request: str, prompt_len: int, start: int, count: int) -> None:
        """One chunk: store, then for each query compact what is due and read."""
        row = self.rows[request]
        for position in range(start, start + count):
            index = position // BLOCK
            held = self.memory.get(row[index])
            # A block's first token claims it; later ones must find it still theirs.
            if position % BLOCK:
                assert held == (request, "dense", index), (held, position)
            self.memory[row[index]] = (request, "dense", index)
        for position in range(start, start + count):
            self._compact(request, self.rule.thin_spans(prompt_len, position))
            self._read(request, position)
        if start < prompt_len == start + count:
            self._compact(request, self.rule.prompt_spans(prompt_len))

    def _compact(self, request: str, target: int) -> None:
        row, rule = self.rows[request], self.rule
        for span in range(self.thin.setdefault(request, 0), target):
            first = span * rule.span_blocks
            for index in range(first, first + rule.span_blocks):
                assert self.memory[row[index]] == (request, "dense", index)
            for index in range(first, first + rule.thin_blocks):
                self.memory[row[index]] = (request, "thin", index)
            self.thin[request] = span + 1

    def _read(self, request: str, position: int) -> None:
        row, rule = self.rows[request], self.rule
        for index in range(position // BLOCK + 1):
            span, offset = divmod(index, rule.span_blocks)
            if span >= self.thin[request]:
                assert self.memory[row[index]] == (request, "dense", index)
            elif offset < rule.thin_blocks:
                assert self.memory[row[index]] == (request, "thin", index)


class Engine:
    """A scheduler with random choices, whose steps run ``lag`` steps late.

    With a lag it schedules ahead of sampled tokens, as vLLM's async scheduling does.
    """

    def __init__(self, spec: ThinKVCacheSpec, lag: int) -> None:
        self.manager = make_manager(spec)
        self.worker = Worker(spec.rule)
        self.lag = lag
        self.in_flight: deque[list[tuple[Request, str, int, int, list[int] | None]]] = deque()
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.incarnation: dict[str, int] = {}

    @property
    def free_blocks(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())

    def name(self, request: Request) -> str:
        return f"{request.request_id}.{self.incarnation[request.request_id]}"

    def arrive(self, prompt_len: int, max_tokens: int) -> None:
        name = f"r{len(self.incarnation)}"
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(name, list(range(prompt_len)), params, None)
        self.incarnation[name] = 0
        self.waiting.append(request)

    def step(self, budget: int) -> None:
        """Schedule up to ``budget`` tokens, and run the step that is now due."""
        scheduled: list[tuple[Request, str, int, int, list[int] | None]] = []
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted below
            budget -= self._schedule(request, min(budget, self._wanted(request)), scheduled)
        for request in list(self.waiting):
            count = min(budget, self._wanted(request))
            if count <= 0:
                break
            done = self._schedule(request, count, scheduled, preempt=False)
            if not done:
                break
            budget -= done
        self.in_flight.append(scheduled)
        while len(self.in_flight) > self.lag:
            self._process(self.in_flight.popleft())

    def drain(self) -> None:
        while self.in_flight:
            self._process(self.in_flight.popleft())

    def abort(self, index: int) -> None:
        everyone = self.running + self.waiting
        if not everyone:
            return
        request = everyone[index % len(everyone)]
        # The pipeline is drained first, as vLLM defers frees past steps in flight.
        self.drain()
        if request in self.running or request in self.waiting:
            self._drop(request)

    def preempt(self, index: int) -> None:
        self.drain()
        if self.running:
            self._preempt(self.running[index % len(self.running)])

    def _wanted(self, request: Request) -> int:
        known = int(request.num_tokens) + int(request.num_output_placeholders)
        return min(known, MAX_LEN - 1) - int(request.num_computed_tokens)

    def _schedule(
        self, request: Request, count: int, scheduled: list[Any], preempt: bool = True
    ) -> int:
        if count <= 0:
            return 0
        while (blocks := self.manager.allocate_slots(request, count)) is None:
            if not preempt:
                return 0
            self.drain()
            if request not in self.running:
                return 0  # it finished meanwhile
            count = min(count, self._wanted(request))
            if count <= 0:
                return 0
            victim = self.running[-1]
            scheduled[:] = [entry for entry in scheduled if entry[0] is not victim]
            self._preempt(victim)
            if victim is request:
                return 0
        if request in self.waiting:
            self.waiting.remove(request)
            self.running.append(request)
            request.status = RequestStatus.RUNNING
        start = int(request.num_computed_tokens)
        new = [int(i) for i in blocks.get_block_ids()[0]]
        scheduled.append((request, self.name(request), start, count, new))
        request.num_computed_tokens += count
        request.num_in_flight_tokens += count
        if request.num_computed_tokens == request.num_tokens + request.num_output_placeholders:
            # Scheduled ahead of the token that this step will sample.
            request.num_output_placeholders += 1
        return count

    def _process(self, scheduled: list[Any]) -> None:
        for request, name, start, count, new in scheduled:
            self.worker.rows.setdefault(name, []).extend(new)
            self.worker.run(name, request.num_prompt_tokens, start, count)
            request.num_in_flight_tokens -= count
            if request in self.running and start + count == request.num_tokens:
                request.num_output_placeholders -= 1
                if (
                    request.num_output_tokens + 1 >= request.max_tokens
                    or request.num_tokens + 1 >= MAX_LEN
                ):
                    self._drop(request)
                else:
                    request.append_output_token_ids(7)

    def _preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_in_flight_tokens = 0
        request.num_output_placeholders = 0
        request.status = RequestStatus.PREEMPTED
        self.incarnation[request.request_id] += 1
        self.running.remove(request)
        self.waiting.insert(0, request)

    def _drop(self, request: Request) -> None:
        self.manager.free(request)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)

    def check_ownership(self) -> None:
        owned = [
            block.block_id
            for request in self.running
            for block in self.manager.get_blocks(request.request_id).blocks[0]
            if not block.is_null
        ]
        assert len(owned) == len(set(owned))
        assert len(owned) + self.free_blocks == NUM_BLOCKS - 1


ACTIONS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 70), st.integers(1, 60)),
    st.tuples(st.just("step"), st.sampled_from([1, 3, 8, 40])),
    st.tuples(st.just("step"), st.sampled_from([8, 40])),
    st.tuples(st.just("steps"), st.integers(2, 25)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("preempt"), st.integers(0, 9)),
)


@settings(max_examples=120, deadline=None)
@given(
    actions=st.lists(ACTIONS, min_size=5, max_size=60),
    lag=st.integers(0, 2),
    recent=st.sampled_from([0, 1, 5, 12]),
    spans=st.sampled_from([(2, 1), (3, 2), (4, 3), (4, 1)]),
    prune_decode=st.booleans(),
)
def test_manager_frees_nothing_that_the_worker_reads_and_leaks_nothing(
    actions: list[tuple[Any, ...]],
    lag: int,
    recent: int,
    spans: tuple[int, int],
    prune_decode: bool,
) -> None:
    spec = make_spec(
        span_blocks=spans[0], thin_blocks=spans[1], recent_window=recent, prune_decode=prune_decode
    )
    engine = Engine(spec, lag)
    assert isinstance(engine.manager.coordinator.single_type_managers[0], ThinKVCacheManager)
    for action, *arguments in actions:
        if action == "steps":
            for _ in range(arguments[0]):
                engine.step(20)
        else:
            getattr(engine, action)(*arguments)
        engine.check_ownership()
    for _ in range(3000):
        if not engine.running and not engine.waiting:
            break
        engine.step(40)
    engine.drain()
    assert not engine.running
    assert not engine.waiting
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
        def freeable_spans(self, prompt_len: int, processed_tokens: int) -> int:
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
