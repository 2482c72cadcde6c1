"""What one engine reports of its pool: counts of its block managers, and what requests hold.

Counts are kept by the managers, when something happens. What requests hold changes with every
step, so it is looked up ten times a second at most, and when the last request ends.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.distributed.utils import get_pp_indices

from think_vllm.hooks.engine import find_engine
from think_vllm.hooks.model_support import attention_layers
from think_vllm.metrics.catalog import BLOCKS, BYTES, CAPACITY, HELD, HITS, MULTIPLE, SPANS, Report
from think_vllm.plan.capacity import PoolShape, pool_capacity
from think_vllm.scheduler.manager import ThinKVCacheManager

#: Least time between two looks at what running requests hold.
LOOK_SECONDS = 0.1

Gauges = dict[str, dict[str, float]]


class EngineReport:
    """Reports of one scheduler.

    Args:
        running: vLLM's list of running requests.
        managers: Of the groups whose layers become thin. All have the same spans.
        block_bytes: Bytes of a block, over all ranks.
        capacity: Gauges that never change.
        clock: Seconds.
    """

    def __init__(
        self,
        running: Callable[[], Sequence[Any]],
        managers: Sequence[ThinKVCacheManager],
        block_bytes: int,
        capacity: Gauges,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._running = running
        self._managers = managers
        self._block_bytes = block_bytes
        self._capacity = capacity
        self._clock = clock
        self._reported = (0, 0, 0)
        self._next_look = 0.0
        self._is_idle = False

    def take(self, measured: Report | None) -> Report | None:
        """Hand out what changed since the last call; None if nothing did.

        Args:
            measured: Report of a rank, which goes along. Extended.
        """
        counters = self._count()
        gauges = self._look()
        if not counters and gauges is None:
            return measured
        report: Report = measured or {}
        if counters:
            report["counters"] = {**report.get("counters", {}), **counters}
        if gauges is not None:
            report["gauges"] = gauges
        return report

    def _count(self) -> dict[str, float]:
        spans = blocks = hit_tokens = 0
        for manager in self._managers:
            counts = manager.counts
            spans, blocks = spans + counts.spans, blocks + counts.blocks
            hit_tokens += counts.hit_tokens
        counted = (spans, blocks, hit_tokens)
        if counted == self._reported:
            return {}
        more = [new - old for new, old in zip(counted, self._reported, strict=True)]
        self._reported = counted
        by_name = {
            SPANS: more[0],
            BLOCKS: more[1],
            BYTES: more[1] * self._block_bytes,
            HITS: more[2],
        }
        return {name: value for name, value in by_name.items() if value}

    def _look(self) -> Gauges | None:
        running = self._running()
        if not running:
            if self._is_idle:
                return None
        elif not self._is_idle and self._clock() < self._next_look:
            return None
        self._is_idle = not running
        self._next_look = self._clock() + LOOK_SECONDS
        manager = self._managers[0]
        rule = manager.rule
        tokens = thin_spans = empty_spans = blocks = 0
        for request in running:
            rows, spans, empty = manager.held(request.request_id)
            tokens += request.num_computed_tokens
            thin_spans, blocks = thin_spans + spans, blocks + rows
            empty_spans += empty
        freed = thin_spans * (rule.span_blocks - rule.thin_blocks) + empty_spans * rule.thin_blocks
        dense_tokens = tokens - thin_spans * rule.span_tokens
        thin_tokens = (thin_spans - empty_spans) * rule.span_tokens
        return {
            HELD: {"dense": dense_tokens, "thin": thin_tokens},
            MULTIPLE: {"": blocks / (blocks - freed) if blocks else 0.0},
            **self._capacity,
        }


def engine_report(scheduler: Any) -> EngineReport | None:
    """Begin the reports of vLLM's scheduler; None if none of its layers become thin."""
    managers = [
        manager
        for manager in scheduler.kv_cache_manager.coordinator.single_type_managers
        if isinstance(manager, ThinKVCacheManager)
    ]
    if not managers:
        return None
    vllm_config = scheduler.vllm_config
    return EngineReport(
        lambda: scheduler.running,  # vLLM replaces the list
        managers,
        _block_bytes(vllm_config, managers[0].kv_cache_spec),
        _capacity(vllm_config, scheduler.kv_cache_config, len(managers)),
    )


def _block_bytes(vllm_config: Any, spec: Any) -> int:
    """Bytes of a block of one group of layers, over all ranks of an engine."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    stages = parallel.pipeline_parallel_size
    count, layers = model.get_total_num_hidden_layers(), attention_layers(model)
    group_layers = sum(
        layers.block_layers(attention_layers(model, get_pp_indices(count, stage, stages)))
        for stage in range(stages)
    )
    page: int = spec.page_size_bytes
    return page * group_layers * int(parallel.tensor_parallel_size)


def _capacity(vllm_config: Any, kv_cache_config: Any, full_groups: int) -> Gauges:
    engine = find_engine(vllm_config)
    if engine is None or engine.plan is None:
        return {}
    groups = kv_cache_config.kv_cache_groups
    pool = PoolShape(
        num_blocks=kv_cache_config.num_blocks - 1,  # vLLM keeps block 0 as the null block
        full_groups=full_groups,
        window_groups=len(groups) - full_groups,
        window_tokens=engine.layers.window_tokens,
    )
    capacity = pool_capacity(engine.plan, pool, vllm_config.model_config.max_model_len)
    return {CAPACITY: {"dense": capacity.plain_tokens, "planned": capacity.thin_tokens}}
