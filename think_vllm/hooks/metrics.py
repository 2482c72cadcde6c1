"""How our metrics join vLLM's, with a ledger of its own beside that of ``hooks/platform.py``.

A report goes the way that vLLM made for those of KV connectors, which are refused with thin blocks:
rank, scheduler, API server. It stays in ``kv_connector_stats`` all along, as a plain dict. All of
this can go when vLLM lets a block manager and an attention backend report.

``GPUModelRunner.sample_tokens`` (V1 and V2) is wrapped
    because what a rank has measured must be put into the step's ``ModelRunnerOutput``, as
    ``kv_connector_output.kv_connector_stats``. V1 takes it from an attribute of that name, which is
    None without a connector; V2 hands out an ``AsyncOutput`` that still has its
    ``model_runner_output``. Ranks that do not sample have nothing to put it in.
``Scheduler.make_stats`` is wrapped
    because it makes what an engine tells its API servers after every step, and has the rank's
    report in its hands, before the next step is scheduled. Ours is kept as an attribute of the
    scheduler.
``KVConnectorProm.__init__`` is wrapped
    because ``prom_metrics``, whose documented base class we extend, comes from connectors alone.
``LoggingStatLogger.__init__`` is wrapped
    because ``kv_connector_logging`` fails on statistics without a connector.
``REGISTRY._collector_to_names`` of prometheus_client is read
    (in ``metrics/prometheus.py``) because a second engine of a process must be able to register
    again; vLLM does the same with its own names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from think_vllm.hooks.engine import find_engine
from think_vllm.hooks.platform import wrap_method

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_MARK = "_think_vllm_metrics"


_takes_verdicts: Callable[[], dict[str, bool]] | None = None


def watch_runner(
    vllm_config: VllmConfig, takes_verdicts: Callable[[], dict[str, bool]] | None = None
) -> None:
    """Send what the layers of this process measure with every step.

    Called by metadata builders: their runner's module has been imported by then.

    Args:
        vllm_config: Of the engine.
        takes_verdicts: Says which requests stay dense of those whose prompts ended in a step. None
            if none does for what it would lose.
    """
    global _takes_verdicts
    from think_vllm.metrics.worker import begin_report

    begin_report()
    _takes_verdicts = takes_verdicts
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu import model_runner as v2

        wrap_method(v2.GPUModelRunner, "sample_tokens", _send_v2)
    else:
        from vllm.v1.worker import gpu_model_runner as v1

        wrap_method(v1.GPUModelRunner, "sample_tokens", _send_v1)


def _send_v1(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    if runner.execute_model_state is not None:  # else this rank does not sample
        measured = _measured()
        if measured is not None:
            runner.kv_connector_output = measured
    return original(runner, *args, **kwargs)


def _send_v2(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(runner, *args, **kwargs)
    if output is not None and runner.is_last_pp_rank:
        measured = _measured()
        if measured is not None:
            output.model_runner_output.kv_connector_output = measured
    return output


def _measured() -> Any:
    """What vLLM sends with a step for a connector; None if nothing was measured."""
    from think_vllm.metrics.catalog import KEPT_DENSE
    from think_vllm.metrics.worker import take_report

    report = take_report()
    if _takes_verdicts is not None and (settled := _takes_verdicts()):
        report = {**(report or {}), "settled": settled}
        dense = sum(settled.values())
        if dense:
            report["counters"] = {**report.get("counters", {}), KEPT_DENSE: dense}
    if report is None:
        return None
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.outputs import KVConnectorOutput

    return KVConnectorOutput(kv_connector_stats=KVConnectorStats(data=report))


def watch_scheduler(
    settle: Callable[[Any, Mapping[str, bool]], None], engine_report: Callable[[Any], Any]
) -> None:
    """Have schedulers of engines with thin blocks send reports.

    Args:
        settle: Gets a scheduler, and whether requests whose prompts have ended stay dense.
        engine_report: Makes the report of a scheduler; None if it has nothing to report.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap_method(Scheduler, "make_stats", functools.partial(_report, settle, engine_report))


def _report(
    settle: Callable[[Any, Mapping[str, bool]], None],
    engine_report: Callable[[Any], Any],
    original: Any,
    scheduler: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # Before the next step is scheduled, and whether or not there are statistics.
    told = args[1] if len(args) > 1 else kwargs.get("kv_connector_stats")
    if told is not None and "settled" in told.data:
        settle(scheduler, told.data.pop("settled"))
    stats = original(scheduler, *args, **kwargs)
    if stats is None:  # --disable-log-stats
        return None
    if not hasattr(scheduler, "think_vllm_report"):
        scheduler.think_vllm_report = engine_report(scheduler)
    if scheduler.think_vllm_report is not None:
        stats.kv_connector_stats = scheduler.think_vllm_report.take(stats.kv_connector_stats)
    return stats


def watch_front_end() -> None:
    """Show the reports of engines with thin blocks on ``/metrics``, and in vLLM's periodic log."""
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
    from vllm.v1.metrics.loggers import LoggingStatLogger

    _follow_constructor(KVConnectorProm, _show)
    _follow_constructor(LoggingStatLogger, _log)


def _follow_constructor(owner: Any, then: Callable[..., None]) -> None:
    """Run ``then(made, vllm_config, ...)`` after the constructor of a class."""
    original = owner.__init__
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def constructor(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        then(self, vllm_config, *args, **kwargs)

    setattr(constructor, _MARK, True)
    owner.__init__ = constructor


def _show(
    prom: Any,
    vllm_config: VllmConfig,
    labelnames: list[str],
    per_engine_labelvalues: dict[int, list[object]],
) -> None:
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.platforms import current_platform

    from think_vllm.metrics.prometheus import ThinkPromMetrics, forget_metrics

    forget_metrics()
    engine = find_engine(vllm_config)
    if engine is None or engine.plan is None:
        return
    types = {Counter: prom._counter_cls, Gauge: prom._gauge_cls, Histogram: prom._histogram_cls}
    prom.prom_metrics = ThinkPromMetrics(
        vllm_config,
        types,
        labelnames,
        per_engine_labelvalues,
        times_compaction=current_platform.is_cpu(),
        has_choices=engine.plan.prunes,
    )


def _log(stat_logger: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
    from think_vllm.metrics.log import CompactionLog

    engine = find_engine(vllm_config)
    if engine is not None and engine.plan is not None:
        stat_logger.kv_connector_logging = CompactionLog()
