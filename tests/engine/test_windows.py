"""Models with sliding-window layers beside full ones: only the full ones become thin.

Both kinds of layers take their blocks from one pool.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.checks import (
    EAGER,
    TOLERANCE,
    check_planned,
    check_served,
    plan_served,
    random_prompts,
    worst_differences,
)
from tests.support.engine import Engine
from tests.support.models import make_model
from tests.support.reference import Reference, Thinning

HEAD_SIZE = 64
FULL, WINDOW = "full_attention", "sliding_attention"

#: Model type, its settings, further arguments, and settings of thin blocks beside the ratio.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]]] = {
    # A cap on scores that they reach, and prompts in small chunks.
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 3,
            "layer_types": [WINDOW, FULL, WINDOW],
            "sliding_window": 100,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 5.0,
        },
        ("--max-num-batched-tokens", "96"),
        {},
    ),
    # Rotary positions that differ by kind of layer, and norms of queries and keys.
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 4,
            "layer_types": [WINDOW, FULL, WINDOW, WINDOW],
            "sliding_window": 33,
            "query_pre_attn_scalar": 64,
        },
        (),
        {},
    ),
    # Attention sinks; the longest prompt loses tokens of its full layer.
    "gpt-oss": (
        "gpt_oss",
        {
            "num_hidden_layers": 2,
            "layer_types": [WINDOW, FULL],
            "sliding_window": 128,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
        },
        (),
        {"kv_evict": "snapkv", "kv_evict_budget": 400},
    ),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logprobs_equal_the_reference(
    load: Callable[..., Engine],
    tmp_path: Path,
    family: tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]],
) -> None:
    model_type, settings, arguments, thin_settings = family
    model = make_model(tmp_path, model_type, head_dim=HEAD_SIZE, **settings)
    plan, flags = plan_served(HEAD_SIZE, kv_channel_prune=0.5, **thin_settings)
    engine = load(*EAGER, *flags, *arguments, model=model)
    span = plan.span_tokens
    lengths = [30, 150, span + 31, span + 32, 700]
    counts = [span + 20] * len(lengths)
    reference = Reference(model)
    completions = check_served(engine, reference, lengths, counts, Thinning.of(plan))
    check_planned(engine, model, flags)
    # The comparison would notice if nothing were pruned.
    dense = worst_differences(reference, random_prompts(lengths)[-1:], completions[-1:], None)
    assert dense[700] > 10 * TOLERANCE
