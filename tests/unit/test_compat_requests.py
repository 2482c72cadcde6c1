"""What a front end refuses, by the flags of the engine behind it."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError

from think_vllm.hooks import requests as compat_requests

STATIC = {"kv_channel_prune": 0.5, "kv_select": "static", "kv_channel_tables_file": "t.json"}


def process(settings: dict[str, Any] | None, extra_args: dict[str, Any], **kwargs: Any) -> str:
    """Send a request to a watched front end."""
    additional = {} if settings is None else {"think": settings}
    processor = SimpleNamespace(vllm_config=SimpleNamespace(additional_config=additional))
    params = SimpleNamespace(extra_args=extra_args)

    def original(*_: Any, **__: Any) -> str:
        return "processed"

    result: str = compat_requests._check_request(
        original, processor, "id", "prompt", params, **kwargs
    )
    return result


@pytest.mark.parametrize("extra_args", [{"kv_channel_prune": False}, {"kv_other": 1}, {"x": 1}])
def test_engines_without_flags_are_left_alone(extra_args: dict[str, Any]) -> None:
    assert process(None, extra_args, resumable=True) == "processed"


def test_static_engines_serve_all_requests_alike() -> None:
    assert process(STATIC, {"temperature_of": 1}, resumable=True) == "processed"
    for extra_args in ({"kv_channel_prune": False}, {"kv_evict_budget": 64}):
        (name,) = extra_args
        with pytest.raises(VLLMValidationError, match=f"{name} .* --kv-select static, whose"):
            process(STATIC, extra_args)
    with pytest.raises(VLLMValidationError, match="a request can set"):
        process(STATIC, {"kv_quant": "fp8"})
