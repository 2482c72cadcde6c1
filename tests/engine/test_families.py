"""Families of models: each as a random-weight model, loaded and compared with the reference.

What differs between them is what comes before attention (biases, norms of queries and keys, scales,
rotary positions), a cap on scores, and sinks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
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
#: No ``head_dim`` in these families: hidden size / heads.
TWO_HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
HALF_ROTARY = {"partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Family:
    """A model and what it is served with."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


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
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_logprobs_equal_the_reference(
    load: Callable[..., Engine], tmp_path: Path, family: Family
) -> None:
    model = make_model(tmp_path, family.model_type, **family.settings)
    plan, arguments = plan_served(HEAD_SIZE, kv_channel_prune=0.5)
    engine = load(*EAGER, *arguments, *family.arguments, model=model)
    span = plan.span_tokens
    lengths = [30, span + 31, span + 32, 700]
    counts = [span + 20] * len(lengths)
    reference = Reference(model)
    completions = check_served(engine, reference, lengths, counts, Thinning.of(plan))
    check_planned(engine, model, arguments)
    # The comparison would notice if nothing were pruned.
    dense = worst_differences(reference, random_prompts(lengths)[-1:], completions[-1:], None)
    assert dense[700] > 10 * TOLERANCE
