"""How many tokens a pool of blocks holds, dense and as planned. Pure integers."""

from dataclasses import dataclass

from think_vllm.plan.planner import BlockPlan
from think_vllm.plan.static_plan import StaticPlan


@dataclass(frozen=True)
class PoolShape:
    """A pool of blocks and who shares it."""

    num_blocks: int  # blocks that requests can have; the null block is none of them
    full_groups: int = 1  # groups of full-attention layers, whose old blocks become thin
    window_groups: int = 0  # groups of sliding-window layers
    window_tokens: int = 0  # of the window, 0 without one


@dataclass(frozen=True)
class PoolCapacity:
    """What such a pool holds of requests of one length."""

    plain_tokens: int  # tokens of as many requests as fit, all dense
    thin_tokens: int  # as planned
    plain_requests: int  # whole requests, all dense
    thin_requests: int  # as planned
    multiple: float  # requests that fit where one dense one does, on average


def pool_capacity(plan: BlockPlan, pool: PoolShape, context_len: int) -> PoolCapacity:
    """Count what a pool holds.

    Args:
        plan: How blocks become thin.
        pool: The pool.
        context_len: Tokens of a request.
    """
    dense = -(-context_len // plan.block_size)
    # A window may begin and end inside a block.
    window = pool.window_groups * min(dense, -(-pool.window_tokens // plan.block_size) + 1)
    plain = pool.full_groups * dense + window
    thin = pool.full_groups * plan.blocks_for(context_len) + window
    multiple = plain / (pool.full_groups * dense / plan.effective_multiple(context_len) + window)
    plain_tokens = pool.num_blocks * plan.block_size * pool.full_groups * dense // plain
    return PoolCapacity(
        plain_tokens=plain_tokens,
        thin_tokens=int(plain_tokens * multiple),
        plain_requests=pool.num_blocks // plain,
        thin_requests=pool.num_blocks // thin,
        multiple=multiple,
    )


def static_capacity(
    plan: StaticPlan, plain_blocks: int, static_blocks: int, context_len: int
) -> PoolCapacity:
    """Count what equal memory holds of plain and of statically pruned blocks.

    Args:
        plan: What a block holds.
        plain_blocks: As many as fit.
        static_blocks: As many as fit.
        context_len: Tokens of a request.
    """
    per_request = -(-context_len // plan.block_size)
    return PoolCapacity(
        plain_tokens=plain_blocks * plan.block_size,
        thin_tokens=static_blocks * plan.block_size,
        plain_requests=plain_blocks // per_request,
        thin_requests=static_blocks // per_request,
        multiple=plan.capacity_multiple,
    )
