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

from think_vllm.hooks import metrics
from think_vllm.hooks.installation import install
from think_vllm.hooks.patches.patch import Role


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
