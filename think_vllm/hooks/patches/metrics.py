"""Reports of workers and schedulers.

Reports travel from rank to scheduler to API server in vLLM's field ``kv_connector_stats``, as plain
dicts: thin blocks do not support KV connectors, which the field is for.
"""

from think_vllm.hooks.patches.patch import Kind, Patch, Role
from think_vllm.hooks.patches.worker import RUNNER_V1, RUNNER_V2

_UNTIL = "block managers and attention backends can report statistics"

PATCHES = (
    Patch(
        "vllm.distributed.kv_transfer.kv_connector.v1.metrics:KVConnectorProm.__init__",
        Kind.WRAPPED,
        "hooks.metrics:show_reports",
        "prom_metrics, whose documented base class we extend, is made for connectors alone",
        _UNTIL,
        role=Role.REPORTS,
        parameters=("self", "vllm_config", "labelnames", "per_engine_labelvalues"),
        members=("prom_metrics", "_gauge_cls", "_counter_cls", "_histogram_cls"),
    ),
    Patch(
        "vllm.v1.metrics.loggers:LoggingStatLogger.__init__",
        Kind.WRAPPED,
        "hooks.metrics:log_reports",
        "kv_connector_logging fails on statistics without a connector",
        _UNTIL,
        role=Role.REPORTS,
        parameters=("self", "vllm_config", "engine_index"),
        members=("kv_connector_logging",),
    ),
    Patch(
        "prometheus_client:REGISTRY._collector_to_names",
        Kind.READ,
        "metrics.prometheus",
        "a second engine of a process registers its metrics again, as vLLM's own do",
        "prometheus_client has a documented way to list collectors",
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.make_stats",
        Kind.WRAPPED,
        "hooks.scheduler:make_stats",
        "it has the worker's report before the next step is scheduled, and makes what API servers "
        "receive",
        _UNTIL,
        role=Role.SCHEDULER,
        parameters=(
            *("self", "spec_decoding_stats", "kv_connector_stats", "cudagraph_stats"),
            *("perf_stats", "ec_connector_stats"),
        ),
        members=("vllm_config",),
        engines_only=True,
    ),
    Patch(
        "vllm.v1.metrics.stats:SchedulerStats.kv_connector_stats",
        Kind.SET,
        "hooks.scheduler",
        "it carries our report to the API servers",
        _UNTIL,
    ),
    Patch(
        f"{RUNNER_V1}.sample_tokens",
        Kind.WRAPPED,
        "hooks.metrics:_send_v1",
        "what a rank has measured belongs into the step's output, which takes it from an attribute",
        _UNTIL,
        role=Role.WORKER_V1,
        parameters=("self", "grammar_output"),
        members=("kv_connector_output", "execute_model_state", "vllm_config"),
        engines_only=True,
    ),
    Patch(
        f"{RUNNER_V2}.sample_tokens",
        Kind.WRAPPED,
        "hooks.metrics:_send_v2",
        "as with V1, whose output V2 wraps in an AsyncOutput",
        _UNTIL,
        role=Role.WORKER_V2,
        device="cuda",
        parameters=("self", "grammar_output"),
        members=("is_last_pp_rank", "vllm_config"),
        engines_only=True,
    ),
    Patch(
        "vllm.v1.outputs:ModelRunnerOutput.kv_connector_output",
        Kind.SET,
        "hooks.metrics",
        "it carries our report to the scheduler",
        _UNTIL,
    ),
)
