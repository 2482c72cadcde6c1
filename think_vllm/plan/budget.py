"""Which plans a budget of old tokens leaves: kept tokens are packed in whole spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from think_vllm.errors import ThinkError

if TYPE_CHECKING:
    from think_vllm.plan.block_plan import BlockPlan

#: Plans that use at least this share of the budget count as using all of it.
USED_SHARE = 0.9


def fit_budget(candidates: Sequence[BlockPlan]) -> list[BlockPlan]:
    """Leave the plans whose spans fill a budget well; all of them without eviction.

    Args:
        candidates: Plans of one configuration, at least one.

    Raises:
        ThinkError: If no span is as short as the budget.
    """
    config = candidates[0].config
    if not config.evicts:
        return list(candidates)
    budget = config.kv_evict_budget
    shortest = min(plan.span_tokens for plan in candidates)
    if shortest > budget:
        one_size = len({plan.block_size for plan in candidates}) == 1
        raise ThinkError(
            f"--kv-evict-budget is {budget}: kept tokens are packed in whole spans, of which the "
            f"shortest here has {shortest} tokens; use --kv-evict-budget {shortest} or more"
            + (", or a smaller --block-size" if one_size else "")
        )
    used = [(kept_tokens(plan), plan) for plan in candidates]
    enough = min(USED_SHARE * budget, max(kept for kept, _ in used))
    return [plan for kept, plan in used if kept >= enough]


def kept_tokens(plan: BlockPlan) -> int:
    """Old tokens of a prompt that each KV head keeps at most: the budget's whole spans."""
    return plan.config.kv_evict_budget // plan.span_tokens * plan.span_tokens
