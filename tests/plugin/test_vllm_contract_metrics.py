"""How our metrics join vLLM's; see ``test_vllm_contract.py``."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm, KVConnectorStats
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.metrics import ray_wrappers
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.gpu import model_runner as v2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from tests.support.contract import check, rows
from think_vllm.hooks import metrics
from think_vllm.hooks.installation import install
from think_vllm.hooks.patches.patch import Role

TABLE = """
hooks/metrics.py
    distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorProm.observe(self, \
        transfer_stats_data, engine_idx)
    v1.worker.gpu.async_utils:AsyncOutput{model_runner_output}
    v1.outputs:KVConnectorOutput{kv_connector_stats}
    # From the rank to the scheduler.
    v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens
        if self.execute_model_state is None:
        kv_connector_output = self.kv_connector_output
        self.kv_connector_output = None
        output = ModelRunnerOutput(
        kv_connector_output=kv_connector_output
    v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens
        if self.execute_model_state is None:
        return None
        model_runner_output.kv_connector_output =
        return async_output
    # Without a connector, nothing else reads what we send. The second argument of make_stats:
    # decisions are read there, with or without statistics.
    v1.core.sched.scheduler:Scheduler.update_from_output
        if kv_connector_output and kv_connector_output.failed_recving
        if kv_connector_output and kv_connector_output.invalid_block_ids
        if kv_connector_output: self._update_from_kv_xfer_finished(
        kv_connector_output.kv_connector_stats if kv_connector_output else None
        if self.connector:
        stats := self.make_stats(spec_decoding_stats, kv_connector_stats,
        eco.scheduler_stats = stats
    # From there to one of the API servers.
    .make_stats
        if not self.log_stats: return None
        kv_connector_stats.to_dict()
    distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorStats.to_dict
        return self.data
    v1.metrics.loggers:PrometheusStatLogger.record
        if scheduler_stats.kv_connector_stats is not None:
        self.kv_connector_prom.observe(scheduler_stats.kv_connector_stats, engine_idx
    .__init__
        self._kv_connector_cls(vllm_config, labelnames, per_engine_labelvalues)
    v1.metrics.loggers:LoggingStatLogger.record
        if kv_connector_stats := scheduler_stats.kv_connector_stats:
        self.kv_connector_logging.observe(kv_connector_stats)
    .log
        self.kv_connector_logging.log(log_fn=log_fn)
    v1.metrics.loggers:AggregatedLoggingStatLogger.__init__
        LoggingStatLogger.__init__(self, vllm_config,
metrics/prometheus.py
    distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorPromMetrics.__init__(self, \
        vllm_config, metric_types, labelnames, per_engine_labelvalues)
    .observe(self, transfer_stats_data, engine_idx)
metrics/log.py
    distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorLogging.observe(self, \
        transfer_stats_data)
    .log(self, log_fn)
scheduler/report.py
    distributed.utils:get_pp_indices(num_hidden_layers, pp_rank, pp_size)
    v1.core.sched.scheduler:Scheduler{kv_cache_config, kv_cache_manager, running}
    v1.core.kv_cache_manager:KVCacheManager{coordinator}
    v1.kv_cache_interface:KVCacheConfig{kv_cache_groups, num_blocks}
    config.parallel:ParallelConfig{pipeline_parallel_size, tensor_parallel_size}
"""


@pytest.mark.parametrize(("ours", "use", "pieces"), rows(TABLE))
def test_vllm_is_what_we_rely_on(ours: str, use: str, pieces: list[str]) -> None:
    check(ours, use, pieces)


def test_rays_metrics_are_made_as_vllms_own() -> None:
    assert issubclass(ray_wrappers.RayKVConnectorProm, KVConnectorProm)
    for kind in (
        ray_wrappers.RayGaugeWrapper,
        ray_wrappers.RayCounterWrapper,
        ray_wrappers.RayHistogramWrapper,
    ):
        assert {"name", "documentation", "labelnames"} <= set(inspect.signature(kind).parameters)


def test_engines_without_thin_blocks_keep_vllms_objects() -> None:
    install(Role.REPORTS)
    install(Role.REPORTS)  # once is enough
    assert not hasattr(KVConnectorProm.__init__.__wrapped__, "__wrapped__")
    config: Any = SimpleNamespace(additional_config={}, kv_transfer_config=None)
    prom = KVConnectorProm(config, ["engine"], {0: ["0"]})
    assert prom.prom_metrics is None


@pytest.mark.parametrize("use_v2", [False, True])
def test_what_a_rank_measured_is_sent_by_ranks_that_sample(use_v2, monkeypatch):
    report = {"counters": {"compaction_seconds": 1.0}}
    monkeypatch.setattr(
        metrics,
        "_measured",
        lambda: KVConnectorOutput(kv_connector_stats=KVConnectorStats(data=report)),
    )
    runner_class = v2.GPUModelRunner if use_v2 else GPUModelRunner

    def original(runner: Any, grammar_output: Any) -> Any:
        if use_v2:
            return SimpleNamespace(model_runner_output=SimpleNamespace(kv_connector_output=None))
        return SimpleNamespace(kv_connector_output=runner.kv_connector_output)

    monkeypatch.setattr(runner_class, "sample_tokens", original)
    metrics.report_metrics(SimpleNamespace(use_v2_model_runner=use_v2))  # type: ignore[arg-type]

    def sent(backend: Any, samples: bool) -> Any:
        attention = SimpleNamespace(backend=backend)
        runner = SimpleNamespace(
            vllm_config=SimpleNamespace(attention_config=attention),
            execute_model_state=object() if samples else None,
            is_last_pp_rank=samples,
            kv_connector_output=None,
        )
        output = runner_class.sample_tokens(runner, None)
        found = getattr(output, "model_runner_output", output).kv_connector_output
        return found and found.kv_connector_stats.to_dict()

    assert sent(AttentionBackendEnum.CUSTOM, True) == report
    assert sent(AttentionBackendEnum.CUSTOM, False) is None
    assert sent(None, True) is None


def test_connectors_come_from_a_config_that_is_rejected() -> None:
    # The way is free: with one, `prom_metrics` would be a connector's.
    assert "kv_connector" in vars(KVTransferConfig())
