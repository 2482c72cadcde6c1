"""How vLLM tells us of requests before they run; see the ledger in ``compat.py``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from think_vllm.compat import wrap_method
from think_vllm.errors import WAY_OUT, ThinkError
from think_vllm.request import own_rule
from think_vllm.spans import SpanRule


def watch_front_end() -> None:
    """Answer requests that cannot be served with an error, one by one, in engines with thin blocks.

    These are streaming-input sessions, and requests that ask for settings there are not.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_method(InputProcessor, "process_inputs", _check_request)


def _check_request(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("resumable"):
        raise ThinkError(
            "thin KV blocks do not support streaming-input sessions: their prompts grow, and thin "
            f"blocks cannot become dense again. Send the whole prompt. {WAY_OUT}"
        )
    params = kwargs["params"] if "params" in kwargs else args[2]
    extra_args = getattr(params, "extra_args", None)  # pooling parameters have none
    if extra_args:
        _check_extra_args(_rule_of(processor), extra_args)
    return original(processor, *args, **kwargs)


def _check_extra_args(rule: SpanRule, extra_args: Mapping[str, Any]) -> None:
    """Refuse what a request asks for, if it is wrong.

    Raises:
        VLLMValidationError: VLLM's own for bad requests, which its server answers with status 400.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        own_rule(rule, extra_args)
    except ThinkError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _rule_of(processor: Any) -> SpanRule:
    """The rule of a front end's engine, planned once."""
    if not hasattr(processor, "think_vllm_rule"):
        from think_vllm.activation import engine_plan

        plan = engine_plan(processor.vllm_config)
        if plan is None:
            raise RuntimeError("think-vllm: a front end without thin blocks is watched")
        processor.think_vllm_rule = plan.rule
    rule: SpanRule = processor.think_vllm_rule
    return rule


def watch_scheduler() -> None:
    """Tell block managers of requests that ask for something, in engines with thin blocks."""
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap_method(Scheduler, "add_request", _announce)


def _announce(original: Any, scheduler: Any, request: Any) -> Any:
    params = request.sampling_params
    if params is not None and params.extra_args:
        announce_request(scheduler.kv_cache_manager.coordinator.single_type_managers, request)
    return original(scheduler, request)


def announce_request(managers: Iterable[Any], request: Any) -> None:
    """Tell an engine's managers of a request, in case it has a rule of its own.

    Args:
        managers: Of all groups of layers; only those whose spans become thin listen.
        request: vLLM's own. If it stays dense it will hit no thin span.
    """
    from think_vllm.blocks.manager import ThinKVCacheManager
    from think_vllm.blocks.prefix import LimitedHashes

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
    from think_vllm.blocks.manager import ThinKVCacheManager

    for manager in managers:
        if isinstance(manager, ThinKVCacheManager):
            manager.settle(request, dense)
