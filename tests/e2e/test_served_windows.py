"""Models with sliding-window layers beside full ones: only the full ones become thin.

Both kinds of layers take their blocks from one pool.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.checks import EAGER, TOLERANCE, check_served, plan_served, worst_differences
from tests.e2e.checks import random_prompts as prompts_of
from tests.support.models import make_exact_llama, make_model
from tests.support.reference import Reference, Thinning
from tests.support.server import Server

pytestmark = pytest.mark.e2e

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
def test_served_logprobs_equal_the_reference(
    serve: Callable[..., Server],
    tmp_path: Path,
    family: tuple[str, dict[str, Any], tuple[str, ...], dict[str, Any]],
) -> None:
    model_type, settings, arguments, thin_settings = family
    model = make_model(tmp_path, model_type, head_dim=HEAD_SIZE, **settings)
    plan, flags = plan_served(HEAD_SIZE, kv_channel_prune=0.5, **thin_settings)
    server = serve(*EAGER, *flags, *arguments, model=model)
    span = plan.span_tokens
    lengths = [30, 150, span + 31, span + 32, 700]
    counts = [span + 20] * len(lengths)
    reference = Reference(model)
    completions = check_served(server, reference, lengths, counts, Thinning.of(plan))
    # The comparison would notice if nothing were pruned.
    dense = worst_differences(reference, prompts_of(lengths)[-1:], completions[-1:], None)
    assert dense[700] > 10 * TOLERANCE
    layers = settings["layer_types"]
    told = f"{layers.count(FULL)} of {len(layers)} layers become thin; the others have a sliding"
    assert told in server.log_tail(10_000)


def test_windows_in_blocks_that_held_codes(serve: Callable[..., Server], tmp_path: Path) -> None:
    # A pool little larger than one request: sliding windows get blocks that were thin a moment ago,
    # and whose codes spell NaNs; full layers get theirs, and requests are preempted.
    model = make_exact_llama(
        tmp_path,
        head_size=HEAD_SIZE,
        num_heads=4,
        num_kv_heads=2,
        num_layers=2,
        # In this order, so that the coded keys are the exact ones of the first layer.
        layer_types=[FULL, WINDOW],
        sliding_window=100,
    )
    plan, flags = plan_served(HEAD_SIZE, kv_channel_prune=0.5, kv_quant="kivi4")
    limits = ("--max-model-len", "2048", "--max-num-batched-tokens", "256")
    # A whole request, and what a window and a chunk take.
    blocks = (2048 + 100 + 256) // plan.block_size + 4
    pool = blocks * plan.layout.run_bytes * 2
    server = serve(*EAGER, *flags, *limits, model=model, kv_cache_bytes=pool)
    # Two requests whose thin blocks are all over the pool when they have ended.
    for prompt in prompts_of([2000, 1950], seed=1):
        server.complete(prompt, 40)
    lengths = [1500, 950, 500, *range(20, 200, 15)]
    check_served(
        server,
        Reference(model),
        lengths,
        [300] * len(lengths),
        Thinning.of(plan),
        frequency_penalty=2.0,
    )
    assert server.metric("vllm:num_preemptions_total") > 0
