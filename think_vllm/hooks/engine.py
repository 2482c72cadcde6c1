"""The plan of the engine whose layers this process builds.

vLLM builds layers with their engine's config at hand, and asks for KV cache specs and metadata
builders without it, so what they need is remembered in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from think_vllm.hooks.activation import engine_plan
from think_vllm.plan.planner import BlockPlan

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class EnginePlan:
    """What an engine's KV cache specs say.

    Args:
        plan: How its blocks are pruned and quantized.
        thin_prefixes: Whether prefix caching keeps thin spans.
        in_flight_tokens: Tokens that are scheduled before the first of them has been processed,
            at most.
    """

    plan: BlockPlan
    thin_prefixes: bool
    in_flight_tokens: int


_selected: EnginePlan | None = None


def remember_plan(vllm_config: VllmConfig) -> BlockPlan:
    """Plan the blocks of the engine whose layers are being built.

    Raises:
        RuntimeError: If that engine has no thin blocks.
    """
    global _selected
    plan = engine_plan(vllm_config)
    if plan is None:
        raise RuntimeError("think-vllm: remember_plan() for an engine without thin blocks")
    _selected = EnginePlan(
        plan=plan,
        thin_prefixes=plan.config.kv_prefix_cache == "thin",
        in_flight_tokens=vllm_config.max_in_flight_tokens,
    )
    return plan


def selected_engine() -> EnginePlan:
    """The plan of the engine whose layers this process built last.

    Raises:
        RuntimeError: If none was built.
    """
    if _selected is None:
        raise RuntimeError("think-vllm: selected_engine() before remember_plan()")
    return _selected
