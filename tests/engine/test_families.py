"""Families and shapes of models, with random weights: each loaded and compared with the reference.

What differs between families is what comes before attention (biases, norms of queries and keys,
scales, rotary positions), a cap on scores, sinks, and layers with sliding windows, which stay dense
and take their blocks from the same pool.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import Load
from tests.support.checks import EAGER, check_planned, check_served, plan_served
from tests.support.models import make_model
from tests.support.reference import Reference, Thinning

HEAD_SIZE = 64
FULL, WINDOW = "full_attention", "sliding_attention"
#: No ``head_dim`` in these families: hidden size / heads.
TWO_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
HALF_ROTARY = {"partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Family:
    """A model, what it is served with, and settings of thin blocks."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    head_size: int = HEAD_SIZE
    block_size: int | None = None
    thin: dict[str, Any] = field(default_factory=lambda: {"kv_channel_prune": 0.5})


def llama(
    heads: int, kv_heads: int, head_size: int, layers: int, ratio: float, **other: Any
) -> Family:
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_size}
    settings = {**shape, "num_hidden_layers": layers}
    thin = {"kv_channel_prune": ratio}
    return Family("llama", settings, head_size=head_size, thin=thin, **other)


FAMILIES = {
    "mistral": Family("mistral", {"head_dim": HEAD_SIZE, "sliding_window": None}),
    "qwen2": Family("qwen2", TWO_HEADS),
    "qwen3": Family("qwen3", {"head_dim": HEAD_SIZE}),
    # Positions turn half of the channels, as in Phi-4-mini.
    "phi3": Family(
        "phi3",
        TWO_HEADS | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | HALF_ROTARY},
    ),
    "gemma": Family("gemma", {"head_dim": HEAD_SIZE}),
    "qwen3-moe": Family(
        "qwen3_moe",
        {"head_dim": HEAD_SIZE, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 64},
    ),
    "granite": Family(
        "granite",
        TWO_HEADS
        | {"attention_multiplier": 0.1, "embedding_multiplier": 3.0}
        | {"residual_multiplier": 0.7, "logits_scaling": 2.0},
    ),
    # vLLM's way to serve a family that it has no model for.
    "transformers": Family("qwen3", {"head_dim": HEAD_SIZE}, ("--model-impl", "transformers")),
    "mqa-64": llama(8, 1, 64, 3, 0.5),
    "mha-80": llama(4, 4, 80, 2, 0.4, block_size=32),
    "gqa-256": llama(4, 2, 256, 2, 0.7),
    # A cap on scores that they reach, and prompts in small chunks.
    "gemma2": Family(
        "gemma2",
        {"head_dim": HEAD_SIZE, "num_hidden_layers": 3, "layer_types": [WINDOW, FULL, WINDOW]}
        | {"sliding_window": 100, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
        ("--max-num-batched-tokens", "96"),
    ),
    # Rotary positions that differ by kind of layer, and norms of queries and keys.
    "gemma3": Family(
        "gemma3_text",
        {"head_dim": HEAD_SIZE, "layer_types": [WINDOW, FULL, WINDOW, WINDOW]}
        | {"num_hidden_layers": 4, "sliding_window": 33, "query_pre_attn_scalar": 64},
    ),
    # Attention sinks; the longest prompt loses tokens of its full layer.
    "gpt-oss": Family(
        "gpt_oss",
        {"head_dim": HEAD_SIZE, "num_hidden_layers": 2, "layer_types": [WINDOW, FULL]}
        | {"sliding_window": 128, "num_local_experts": 2, "num_experts_per_tok": 2},
        thin={"kv_channel_prune": 0.5, "kv_evict": "snapkv", "kv_evict_budget": 400},
    ),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logprobs_equal_the_reference(load: Load, tmp_path: Path, family: Family) -> None:
    model = make_model(tmp_path, family.model_type, **family.settings)
    plan, flags = plan_served(family.head_size, family.block_size, **family.thin)
    engine = load(*EAGER, *flags, *family.arguments, model=model)
    span = plan.span_tokens
    lengths = [30, 150, span + 31, span + 32, 2 * span + 100, 900]
    counts = [span + 20] * len(lengths)
    reference = Reference(model)
    # The comparison would notice if nothing were pruned.
    check_served(engine, reference, lengths, counts, Thinning.of(plan), others=[None])
    check_planned(engine, model, flags)
