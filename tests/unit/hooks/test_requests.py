"""Which requests a front end rejects, by the flags of the engine behind it."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from vllm.exceptions import VLLMValidationError

from think_vllm.hooks.engine import Engine
from think_vllm.hooks.model_support import AttentionLayers
from think_vllm.hooks.requests import check_request
from think_vllm.plan.parsing import parse_config

STATIC = {"kv_channel_prune": 0.5, "kv_select": "static", "kv_channel_tables_file": "t.json"}


def process(settings: dict[str, Any] | None, extra_args: dict[str, Any], **kwargs: Any) -> str:
    """Send a request to the front end of an engine."""
    engine = None
    if settings is not None:
        engine = Engine(parse_config(settings), AttentionLayers(1, 0, 0))
    processor = SimpleNamespace(vllm_config=None)
    params = SimpleNamespace(extra_args=extra_args)

    def original(*_: Any, **__: Any) -> str:
        return "processed"

    with patch("think_vllm.hooks.requests.find_engine", return_value=engine):
        result: str = check_request(original, processor, "id", "prompt", params, **kwargs)
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
