"""Settings of requests, checked before they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from think_vllm.errors import REMEDY, ThinkError
from think_vllm.hooks.engine import find_engine
from think_vllm.plan.request import reject_settings, request_override
from think_vllm.plan.spans import SpanRule


@dataclass(frozen=True)
class _Engine:
    """What requests may set: the rule of their engine is None if no block of it becomes thin."""

    rule: SpanRule | None
    is_static: bool


def check_request(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Answer a request that cannot be served with an error, before it reaches the engine.

    These are streaming-input sessions, and requests with unsupported settings.

    Raises:
        ThinkError: If it is a streaming-input session.
        VLLMValidationError: If a setting is wrong.
    """
    engine = _engine_of(processor)
    if engine.rule is not None and kwargs.get("resumable"):
        raise ThinkError(
            "thin KV blocks do not support streaming-input sessions: their prompts grow, and thin "
            f"blocks cannot become dense again. Send the whole prompt. {REMEDY}"
        )
    params = kwargs["params"] if "params" in kwargs else args[2]
    extra_args = getattr(params, "extra_args", None)  # pooling parameters have none
    if extra_args:
        _check_extra_args(engine, extra_args)
    return original(processor, *args, **kwargs)


def _check_extra_args(engine: _Engine, extra_args: Mapping[str, Any]) -> None:
    """Check the settings of a request.

    Raises:
        VLLMValidationError: If one is wrong; vLLM's server answers with status 400.
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
    """Engine of a front end, described once. One without our flags may share the process."""
    if not hasattr(processor, "think_vllm_engine"):
        engine = find_engine(processor.vllm_config)
        plan = None if engine is None else engine.plan
        processor.think_vllm_engine = _Engine(
            rule=None if plan is None else plan.rule,
            is_static=engine is not None and engine.config.is_static,
        )
    known: _Engine = processor.think_vllm_engine
    return known
