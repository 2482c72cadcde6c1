"""Evicted tokens against a model in which each head's are hidden; over HTTP: e2e/."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.conftest import Load
from tests.support.checks import EAGER, check_served, plan_served
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning
from think_vllm.plan.formats import FORMATS


def test_h2o(load: Load, recall_reference: Reference) -> None:
    # Sums run over chunks; a second prompt with the same beginning must not find it in a cache.
    plan, flags = plan_served(128, kv_channel_prune=0.4, kv_evict="h2o", kv_evict_budget=400)
    engine = load(*EAGER, *flags, "--max-num-batched-tokens", "512")
    thinning = Thinning.of(plan)
    lengths, others = [60, 480, 700, 1111, 1900], [replace(thinning, evict="snapkv")]
    check_served(engine, recall_reference, lengths, [150] * 5, thinning, others=others)
    check_served(engine, recall_reference, lengths[2:], [20] * 3, thinning, together=False)
    assert "prefix caching is off" in engine.log_tail(20_000)


@pytest.mark.parametrize(
    "settings",
    [
        # Only quantized, with every channel.
        {"kv_quant": "k4v2", "kv_evict": "snapkv", "kv_evict_budget": 512},
        {"kv_channel_prune": 0.5, "kv_quant": "fp8", "kv_evict": "h2o", "kv_evict_budget": 400},
        {"kv_channel_prune": 0.5, "kv_quant": "kivi2", "kv_select": "key-norm"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_choices_in_codes(load: Load, tmp_path: Path, settings: dict[str, float | str]) -> None:
    # Prompts in one chunk, on keys that are exact.
    model = make_exact_llama(tmp_path)
    plan, flags = plan_served(128, **settings)
    engine = load(*EAGER, *flags, "--max-model-len", "2048", model=model)
    thinning, reference = Thinning.of(plan), Reference(model)
    lengths = [20, plan.span_tokens + 40, 700, 1400, 1900]
    options = {"frequency_penalty": 2.0, "others": [replace(thinning, format=FORMATS["none"])]}
    check_served(engine, reference, lengths, [300] * 4 + [120], thinning, **options)
