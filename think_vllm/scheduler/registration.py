"""Register the block manager with vLLM, and what it needs to receive of requests."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

from think_vllm.hooks.kv_cache import register_spec
from think_vllm.hooks.scheduler import Receivers, hook_scheduler
from think_vllm.plan.request import request_override
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.prefix import LimitedHashes
from think_vllm.scheduler.report import engine_report


def register(spec: type[Any]) -> None:
    """Give layers of a KV cache spec our manager, and let vLLM's schedulers report to it.

    Args:
        spec: ``ThinKVCacheSpec``.
    """
    register_spec(spec, ThinKVCacheManager, base=FullAttentionSpec)
    hook_scheduler(Receivers(register_request, resolve_requests, engine_report))


def register_request(managers: Iterable[Any], request: Any) -> None:
    """Register a request with an engine's managers, if it has an override.

    Args:
        managers: Of all groups of layers; only those whose spans become thin take part.
        request: vLLM's own. If it stays dense it will hit no thin span.
    """
    ours = [manager for manager in managers if isinstance(manager, ThinKVCacheManager)]
    own = request_override(ours[0].rule, request.sampling_params.extra_args) if ours else None
    if own is None:
        return
    for manager in ours:
        manager.rules.register(request)
    if own.stays_dense:
        request.block_hashes = LimitedHashes(request.block_hashes, sys.maxsize, max_thin_spans=0)


def resolve_requests(scheduler: Any, decisions: Mapping[str, bool]) -> None:
    """Report to block managers what the worker decided about requests whose prompts have ended.

    Args:
        scheduler: vLLM's.
        decisions: Whether each stays dense.
    """
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for name, dense in decisions.items():
        request = scheduler.requests.get(name)
        if request is not None:  # else it has ended with its prompt
            resolve_request(managers, request, dense)


def resolve_request(managers: Iterable[Any], request: Any, dense: bool) -> None:
    """As ``resolve_requests``, of one request."""
    for manager in managers:
        if isinstance(manager, ThinKVCacheManager):
            manager.resolve(request, dense)
