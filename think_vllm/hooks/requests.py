"""How we receive requests from vLLM before they run; see the ledger in ``hooks/platform.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from think_vllm.errors import WAY_OUT, ThinkError
from think_vllm.hooks.engine import find_engine
from think_vllm.hooks.platform import wrap_method
from think_vllm.plan.request import reject_settings, request_override
from think_vllm.plan.spans import SpanRule


@dataclass(frozen=True)
class _Engine:
    """What requests may ask of an engine: its rule; None if no block of it becomes thin."""

    rule: SpanRule | None
    is_static: bool


def watch_front_end() -> None:
    """Answer requests that cannot be served with an error, one by one, in engines with thin blocks.

    These are streaming-input sessions, and requests that ask for settings there are not.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    wrap_method(InputProcessor, "process_inputs", _check_request)


def _check_request(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    engine = _engine_of(processor)
    if engine.rule is not None and kwargs.get("resumable"):
        raise ThinkError(
            "thin KV blocks do not support streaming-input sessions: their prompts grow, and thin "
            f"blocks cannot become dense again. Send the whole prompt. {WAY_OUT}"
        )
    params = kwargs["params"] if "params" in kwargs else args[2]
    extra_args = getattr(params, "extra_args", None)  # pooling parameters have none
    if extra_args:
        _check_extra_args(engine, extra_args)
    return original(processor, *args, **kwargs)


def _check_extra_args(engine: _Engine, extra_args: Mapping[str, Any]) -> None:
    """Reject what a request asks for, if it is wrong.

    Raises:
        VLLMValidationError: VLLM's own for bad requests, which its server answers with status 400.
    """
    from vllm.exceptions import VLLMValidationError

    try:
        if engine.rule is not None:
            request_override(engine.rule, extra_args)
        elif engine.is_static:
            reject_settings(extra_args)
    except ThinkError as error:
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None


def _engine_of(processor: Any) -> _Engine:
    """A front end's engine, looked at once. One without our flags may share the process."""
    if not hasattr(processor, "think_vllm_engine"):
        engine = find_engine(processor.vllm_config)
        plan = None if engine is None else engine.plan
        processor.think_vllm_engine = _Engine(
            rule=None if plan is None else plan.rule,
            is_static=engine is not None and engine.config.is_static,
        )
    known: _Engine = processor.think_vllm_engine
    return known


def watch_scheduler(register: Callable[[Iterable[Any], Any], None]) -> None:
    """Report requests that ask for something, in engines with thin blocks.

    Args:
        register: Gets the engine's block managers and the request.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    def add_request(original: Any, scheduler: Any, request: Any) -> Any:
        params = request.sampling_params
        if params is not None and params.extra_args:
            register(scheduler.kv_cache_manager.coordinator.single_type_managers, request)
        return original(scheduler, request)

    wrap_method(Scheduler, "add_request", add_request)
