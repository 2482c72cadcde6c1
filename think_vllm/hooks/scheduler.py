"""Pass vLLM's new requests to our block managers, and add our figures to its statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from think_vllm.hooks.installation import install
from think_vllm.hooks.patches.patch import Role


@dataclass(frozen=True)
class Receivers:
    """What a scheduler of an engine with thin blocks calls."""

    #: Receives the engine's block managers and a request that has settings of its own, before it is
    #: queued.
    register_request: Callable[[Iterable[Any], Any], None]
    #: Receives a scheduler, and whether requests whose prompts have ended stay dense.
    resolve: Callable[[Any, Mapping[str, bool]], None]
    #: Makes the report of a scheduler; None if it has nothing to report.
    engine_report: Callable[[Any], Any]


_receivers: Receivers


def hook_scheduler(receivers: Receivers) -> None:
    """Call receivers from now on, in engines with thin blocks."""
    global _receivers
    _receivers = receivers
    install(Role.SCHEDULER)


def add_request(original: Any, scheduler: Any, request: Any) -> Any:
    """Register a request that has settings of its own."""
    params = request.sampling_params
    if params is not None and params.extra_args:
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        _receivers.register_request(managers, request)
    return original(scheduler, request)


def make_stats(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Resolve what the worker has decided, and add our report to vLLM's statistics."""
    # Before the next step is scheduled, and whether or not there are statistics.
    received = args[1] if len(args) > 1 else kwargs.get("kv_connector_stats")
    if received is not None and "resolved" in received.data:
        _receivers.resolve(scheduler, received.data.pop("resolved"))
    stats = original(scheduler, *args, **kwargs)
    if stats is None:  # --disable-log-stats
        return None
    if not hasattr(scheduler, "think_vllm_report"):
        scheduler.think_vllm_report = _receivers.engine_report(scheduler)
    if scheduler.think_vllm_report is not None:
        stats.kv_connector_stats = scheduler.think_vllm_report.take(stats.kv_connector_stats)
    return stats
