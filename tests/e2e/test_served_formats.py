"""Formats and choices over HTTP that no other server has; all of them without one: tests/engine."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checks import (
    EAGER,
    TOLERANCE,
    check_served,
    plan_served,
    random_prompts,
    worst_differences,
)
from tests.support.models import make_exact_llama
from tests.support.reference import Reference, Thinning
from tests.support.server import Server
from think_vllm.plan.formats import FORMATS

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_quant": "fp8", "kv_evict": "h2o", "kv_evict_budget": 400},
        {"kv_quant": "kivi2", "kv_select": "key-norm"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_served_logprobs_equal_the_reference(
    serve: Callable[..., Server], tmp_path: Path, settings: dict[str, float | str]
) -> None:
    model = make_exact_llama(tmp_path, head_size=128, num_heads=4, num_kv_heads=2)
    plan, flags = plan_served(128, kv_channel_prune=0.5, **settings)
    server = serve(*EAGER, *flags, "--max-model-len", "2048", model=model)
    lengths = [20, plan.span_tokens + 32, 700, 1400]
    reference, thinning = Reference(model), Thinning.of(plan)
    completions = check_served(
        server, reference, lengths, [200] * len(lengths), thinning, frequency_penalty=2.0
    )
    # The comparison would notice if nothing were quantized.
    plain = replace(thinning, format=FORMATS["none"])
    prompts = random_prompts(lengths)
    assert (
        worst_differences(reference, prompts[-1:], completions[-1:], plain)[1400] > 10 * TOLERANCE
    )
