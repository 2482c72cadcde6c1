"""The block manager under vLLM's real scheduler with several steps under way.

In a pipeline the scheduler runs ahead: a request may lose its blocks, and somebody else get
them, before the step that still reads them has run. Every rank runs steps in their order, so
one model of a rank's memory is enough: it runs each step as late as the pipeline allows, writes
a tag into every block that a rank would write, and checks the tag of every block it would read.
"""

import random
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.support.block_worker import make_spec
from think_vllm.plan.spans import SpanRule

BLOCK = 4
NUM_BLOCKS = 48
MAX_LEN = 120
SPEC = make_spec()


@pytest.fixture(scope="module")
def config(recall_model: Path) -> VllmConfig:
    """Of an engine with a pipeline; the plan's block size does not matter here."""
    config = EngineArgs(
        str(recall_model),
        max_model_len=MAX_LEN,
        max_num_batched_tokens=24,
        max_num_seqs=8,
        pipeline_parallel_size=2,
        enable_prefix_caching=False,
        block_size=BLOCK * 8,
    ).create_engine_config()
    config.cache_config.block_size = BLOCK
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    return config


@dataclass
class Rank:
    """Contents of every block, and what a rank knows of each request.

    Tags name the step that began a request's present life, as a preempted one may still run.
    """

    memory: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    rows: dict[str, list[int]] = field(default_factory=dict)
    prompt_lens: dict[str, int] = field(default_factory=dict)
    thin: dict[str, int] = field(default_factory=dict)
    life: dict[str, int] = field(default_factory=dict)
    num_lives: int = 0

    def run(self, step: SchedulerOutput) -> None:
        starts = {}
        for new in step.scheduled_new_reqs:
            self.prompt_lens[new.req_id] = len(new.prompt_token_ids)
            self._begin(new.req_id, new.block_ids[0])
            starts[new.req_id] = new.num_computed_tokens
        cached = step.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            blocks = cached.new_block_ids[i]
            if name in cached.resumed_req_ids:
                self._begin(name, blocks[0])
            elif blocks is not None:
                self.rows[name].extend(blocks[0])
            starts[name] = cached.num_computed_tokens[i]
        for name, count in step.num_scheduled_tokens.items():
            self._run(name, starts[name], count)

    def _begin(self, name: str, blocks: list[int]) -> None:
        self.num_lives += 1
        self.rows[name], self.thin[name], self.life[name] = list(blocks), 0, self.num_lives

    def _run(self, name: str, start: int, count: int) -> None:
        prompt_len = self.prompt_lens[name]
        for position in range(start, start + count):
            index = position // BLOCK
            # A block's first token claims it; later ones must find it still theirs.
            if position % BLOCK:
                self._expect(name, "dense", index)
            self._write(name, "dense", index)
        for position in range(start, start + count):
            self._compact(name, SPEC.rule.thin_spans(prompt_len, position))
            self._read(name, position)
        if start < prompt_len == start + count:
            self._compact(name, SPEC.rule.prompt_spans(prompt_len))

    def _compact(self, name: str, target: int) -> None:
        for span in range(self.thin[name], target):
            first = span * SPEC.rule.span_blocks
            for index in range(first, first + SPEC.rule.span_blocks):
                self._expect(name, "dense", index)
            for index in range(first, first + SPEC.rule.thin_blocks):
                self._write(name, "thin", index)
            self.thin[name] = span + 1

    def _read(self, name: str, position: int) -> None:
        for index in range(position // BLOCK + 1):
            span, offset = divmod(index, SPEC.rule.span_blocks)
            if span >= self.thin[name]:
                self._expect(name, "dense", index)
            elif offset < SPEC.rule.thin_blocks:
                self._expect(name, "thin", index)

    def _write(self, name: str, kind: str, index: int) -> None:
        self.memory[self.rows[name][index]] = (name, self.life[name], kind, index)

    def _expect(self, name: str, kind: str, index: int) -> None:
        held = self.memory.get(self.rows[name][index])
        assert held == (name, self.life[name], kind, index), f"{name} finds {held}"


class Pipeline:
    """vLLM's loop over a scheduler and a queue of steps, and what happened in it."""

    def __init__(self, config: VllmConfig, depth: int) -> None:
        cache = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], SPEC)])
        outputs = StructuredOutputManager(config)
        self.scheduler = Scheduler(config, cache, outputs, block_size=BLOCK)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.manager = self.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self.rank = Rank()
        self.depth = depth
        self.queue: deque[tuple[SchedulerOutput, dict[str, bool]]] = deque()
        self.preempted_under_way = 0
        self.chunks_under_way = 0

    def turn(self) -> None:
        """Schedule a step, and run the oldest one if the queue is full or nothing was left."""
        requests = self.scheduler.requests
        step = self.scheduler.schedule()
        under_way = {name for queued, _ in self.queue for name in queued.num_scheduled_tokens}
        self.preempted_under_way += len(under_way & set(step.preempted_req_ids or ()))
        self.chunks_under_way += len(under_way & set(step.num_scheduled_tokens))
        samples = {
            name: requests[name].num_computed_tokens == requests[name].num_tokens
            for name in step.num_scheduled_tokens
        }
        self.queue.append((step, samples))
        if len(self.queue) == self.depth or not step.num_scheduled_tokens:
            self._finish_one()

    def drain(self) -> None:
        while self.queue:
            self._finish_one()

    def _finish_one(self) -> None:
        step, samples = self.queue.popleft()
        self.rank.run(step)
        names = list(samples)
        output = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[[7] if samples[name] else [] for name in names],
        )
        self.scheduler.update_from_output(step, output)


def serve_load(pipeline: Pipeline, seed: int) -> None:
    """Let requests arrive at random while others run, until all are done."""
    rng = random.Random(seed)
    arrivals = 30
    while arrivals or pipeline.scheduler.has_requests():
        if arrivals and rng.random() < 0.3:
            params = SamplingParams(max_tokens=rng.randint(1, 60), ignore_eos=True)
            prompt = [7] * rng.randint(1, 70)
            pipeline.scheduler.add_request(Request(f"r{arrivals}", prompt, params, None))
            arrivals -= 1
        if pipeline.scheduler.has_requests():
            pipeline.turn()
    pipeline.drain()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_steps_under_way_read_their_own_blocks(config: VllmConfig, depth: int, seed: int) -> None:
    pipeline = Pipeline(config, depth)
    serve_load(pipeline, seed)
    assert pipeline.pool.get_num_free_blocks() == NUM_BLOCKS - 1
    # What a pipeline adds did happen.
    assert (pipeline.preempted_under_way > 0) == (depth > 1)
    assert (pipeline.chunks_under_way > 0) == (depth > 1)


def test_blocks_freed_a_step_too_early_are_noticed(config: VllmConfig) -> None:
    class Hasty(SpanRule):
        def freeable_spans(self, prompt_len: int, processed_tokens: int, cached: int = 0) -> int:
            return self.thin_spans(prompt_len, max(prompt_len, processed_tokens + 1))

    pipeline = Pipeline(config, 2)
    pipeline.manager.rule = Hasty(**vars(SPEC.rule))
    with pytest.raises(AssertionError, match="finds"):
        serve_load(pipeline, 0)
