"""How our metrics join vLLM's: from a rank's layers to ``/metrics`` and to vLLM's periodic log."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from think_vllm.hooks.engine import find_engine
from think_vllm.hooks.installation import install_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_take_decisions: Callable[[], dict[str, bool]] | None = None


def report_metrics(
    vllm_config: VllmConfig, take_decisions: Callable[[], dict[str, bool]] | None = None
) -> None:
    """Send what the layers of this process measure with every step.

    Called by metadata builders: their runner's module has been imported by then.

    Args:
        vllm_config: Of the engine.
        take_decisions: Returns, of the requests whose prompts ended in a step, whether each stays
            dense. None for engines without a limit on what is lost.
    """
    global _take_decisions
    from think_vllm.metrics.rank import begin_report

    begin_report()
    _take_decisions = take_decisions
    install_worker(vllm_config)


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
    from think_vllm.metrics.rank import take_report

    report = take_report()
    if _take_decisions is not None and (decisions := _take_decisions()):
        report = {**(report or {}), "resolved": decisions}
        dense = sum(decisions.values())
        if dense:
            report["counters"] = {**report.get("counters", {}), KEPT_DENSE: dense}
    if report is None:
        return None
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats
    from vllm.v1.outputs import KVConnectorOutput

    return KVConnectorOutput(kv_connector_stats=KVConnectorStats(data=report))


def show_reports(
    original: Callable[..., None],
    prom: Any,
    vllm_config: VllmConfig,
    labelnames: list[str],
    per_engine_labelvalues: dict[int, list[object]],
) -> None:
    """Show the reports of an engine with thin blocks on ``/metrics``."""
    original(prom, vllm_config, labelnames, per_engine_labelvalues)
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
        has_selections=engine.plan.prunes,
    )


def log_reports(
    original: Callable[..., None],
    stat_logger: Any,
    vllm_config: VllmConfig,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Log the reports of an engine with thin blocks, in place of a connector's."""
    original(stat_logger, vllm_config, *args, **kwargs)
    from think_vllm.metrics.log import CompactionLog

    engine = find_engine(vllm_config)
    if engine is not None and engine.plan is not None:
        stat_logger.kv_connector_logging = CompactionLog()
