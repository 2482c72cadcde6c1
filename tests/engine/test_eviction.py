"""Evicted tokens against a model in which each head's are hidden; over HTTP: e2e/."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.support.checks import (
    EAGER,
    TOLERANCE,
    check_served,
    plan_served,
    random_prompts,
    worst_differences,
)
from tests.support.engine import Engine
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning

MAX_MODEL_LEN = 2048


def test_h2o(load: Callable[..., Engine], recall_reference: Reference) -> None:
    # Sums run over chunks; a second prompt with the same beginning must not find it in a cache.
    plan, flags = plan_served(128, kv_channel_prune=0.4, kv_evict="h2o", kv_evict_budget=400)
    engine = load(*EAGER, *flags, "--max-num-batched-tokens", "512")
    thinning = Thinning.of(plan)
    lengths = [60, 480, 700, 1111, 1900]
    completions = check_served(engine, recall_reference, lengths, [150] * 5, thinning)
    check_served(engine, recall_reference, lengths[2:], [20] * 3, thinning, together=False)
    assert "prefix caching is off" in engine.log_tail(20_000)
    prompts = random_prompts(lengths)[-1:]
    other = replace(thinning, evict="snapkv")
    worst = worst_differences(recall_reference, prompts, completions[-1:], other)
    assert worst[1900] > 10 * TOLERANCE


def test_snapkv_in_codes(load: Callable[..., Engine], tmp_path: Path) -> None:
    # Only quantized, with every channel; prompts in one chunk, on keys that are exact.
    model = make_exact_llama(tmp_path, head_size=128, num_heads=4, num_kv_heads=2)
    plan, flags = plan_served(128, kv_quant="k4v2", kv_evict="snapkv", kv_evict_budget=512)
    engine = load(*EAGER, *flags, "--max-model-len", str(MAX_MODEL_LEN), model=model)
    thinning = Thinning.of(plan)
    lengths = [50, plan.span_tokens + 40, 700, 1400, 1900]
    completions = check_served(
        engine,
        Reference(model),
        lengths,
        [300, 300, 300, 300, 120],
        thinning,
        frequency_penalty=2.0,
    )
    prompts = random_prompts(lengths)[-1:]
    plain = replace(thinning, format=plan_served(128, kv_channel_prune=0.5)[0].format)
    worst = worst_differences(Reference(model), prompts, completions[-1:], plain)
    assert worst[1900] > 10 * TOLERANCE
