"""What a request may ask for itself, and how it is told that it may not."""

from dataclasses import replace
from typing import Any

import pytest

from think_vllm.errors import ThinkError
from think_vllm.plan.request import request_override
from think_vllm.plan.spans import SpanRule

PRUNING = SpanRule(16, 4, 3, 32, True)  # spans of 64 tokens
PREFILL = replace(PRUNING, prune_prefill=True)
EVICTING = replace(PRUNING, delay_prompt=True, budget_spans=4)


@pytest.mark.parametrize("value", [False, 0, 0.0, "false", " False ", "0"])
@pytest.mark.parametrize("rule", [PRUNING, EVICTING, replace(PRUNING, prune_decode=False)])
def test_request_override_of_a_dense_request_makes_nothing_thin(rule: SpanRule, value: Any) -> None:
    own = request_override(rule, {"kv_channel_prune": value})
    assert own is not None
    assert own.stays_dense
    for length in (1, 64, 96, 5000, 10_000_000):
        assert own.prompt_spans(length) == own.evicted_spans(length) == 0
        for ahead in (0, 1, 64, 100_000):
            assert own.thin_spans(length, length + ahead) == 0
            assert own.freeable_spans(length, length + ahead) == 0
            assert own.exact_tokens(length) > length + ahead


@pytest.mark.parametrize(
    ("value", "spans"),
    [(64, 1), (127, 1), (512, 8), ("512", 8), (1 << 40, 1 << 34), (0, None), (False, None)],
)
def test_request_override_has_the_budget_in_whole_spans(value: Any, spans: int | None) -> None:
    assert request_override(EVICTING, {"kv_evict_budget": value}) == replace(
        EVICTING, budget_spans=spans
    )


@pytest.mark.parametrize(
    ("rule", "asked"),
    [
        (PRUNING, None),
        (PRUNING, {}),
        (PRUNING, {"session_id": "x", "kv_transfer_params": {}, "kv_cache_report_mode": "full"}),
        (PRUNING, {"kv_channel_prune": True}),
        (PRUNING, {"kv_channel_prune": 1}),
        (PRUNING, {"kv_channel_prune": "true"}),
        (PRUNING, {"kv_evict_budget": 0}),
        (EVICTING, {"kv_evict_budget": 256}),
        (EVICTING, {"kv_evict_budget": 319, "kv_channel_prune": True}),
    ],
)
def test_request_override_is_none_where_it_is_the_servers(rule, asked):
    assert request_override(rule, asked) is None


def test_request_override_of_a_dense_request_that_evicts_nothing() -> None:
    own = request_override(EVICTING, {"kv_channel_prune": False, "kv_evict_budget": 0})
    assert own == request_override(EVICTING, {"kv_channel_prune": False})


@pytest.mark.parametrize(
    ("rule", "asked", "message"),
    [
        (PRUNING, {"kv_channel_prune": 0.3}, r"kv_channel_prune is 0.3 .* give false"),
        (PRUNING, {"kv_channel_prune": 1.0}, r"kv_channel_prune is 1.0"),
        (PRUNING, {"kv_channel_prune": "no"}, r"kv_channel_prune is 'no'"),
        (PRUNING, {"kv_channel_prune": None}, r"kv_channel_prune is None"),
        (PRUNING, {"kv_channel_prune": [0]}, r"kv_channel_prune is \[0\]"),
        (PRUNING, {"kv_quant": "none"}, r"kv_quant .* the rest are settings of the server"),
        (PRUNING, {"kv_b": 1, "kv_a": 1}, r"kv_a, kv_b .* Leave them out"),
        (PRUNING, {"kv_evict_budget": 512}, r"is 512 .* evicts nothing; .* with --kv-evict"),
        (EVICTING, {"kv_evict_budget": 63}, r"is 63 .* have 64 tokens here; give 64 or more"),
        (EVICTING, {"kv_evict_budget": True}, r"kv_evict_budget is True .* a whole number"),
        (EVICTING, {"kv_evict_budget": -64}, r"kv_evict_budget is -64"),
        (EVICTING, {"kv_evict_budget": 512.0}, r"kv_evict_budget is 512.0"),
        (EVICTING, {"kv_evict_budget": "many"}, r"kv_evict_budget is 'many'"),
        (EVICTING, {"kv_channel_prune": False, "kv_evict_budget": 512}, "keeps all its tokens"),
        (PREFILL, {"kv_channel_prune": False}, "ask a server without --kv-prune-prefill"),
    ],
)
def test_request_override_rejects(rule: SpanRule, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ThinkError, match=message) as rejected:
        request_override(rule, asked)
    assert "vllm_xargs; offline SamplingParams.extra_args" in str(rejected.value)
