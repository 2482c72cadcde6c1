"""What block managers are told of a request, before it runs and when its prompt has ended."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from think_vllm.plan.request import own_rule
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.prefix import LimitedHashes


def announce_request(managers: Iterable[Any], request: Any) -> None:
    """Tell an engine's managers of a request, in case it has a rule of its own.

    Args:
        managers: Of all groups of layers; only those whose spans become thin listen.
        request: vLLM's own. If it stays dense it will hit no thin span.
    """
    ours = [manager for manager in managers if isinstance(manager, ThinKVCacheManager)]
    own = own_rule(ours[0].rule, request.sampling_params.extra_args) if ours else None
    if own is None:
        return
    for manager in ours:
        manager.rules.announce(request)
    if own.stays_dense:
        request.block_hashes = LimitedHashes(request.block_hashes, sys.maxsize, max_thin_spans=0)


def settle_requests(scheduler: Any, verdicts: Mapping[str, bool]) -> None:
    """Tell block managers what the worker has decided about requests whose prompts have ended.

    Args:
        scheduler: vLLM's.
        verdicts: Whether each stays dense.
    """
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    for name, dense in verdicts.items():
        request = scheduler.requests.get(name)
        if request is not None:  # else it has ended with its prompt
            settle_request(managers, request, dense)


def settle_request(managers: Iterable[Any], request: Any, dense: bool) -> None:
    """As ``settle_requests``, of one request."""
    for manager in managers:
        if isinstance(manager, ThinKVCacheManager):
            manager.settle(request, dense)
