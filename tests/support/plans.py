"""Plans for tests."""

from think_vllm.plan.parsing import parse_config
from think_vllm.plan.planner import BlockPlan, plan_blocks


def make_plan(
    head_size: int = 128, itemsize: int = 2, block_size: int | None = None, **settings: object
) -> BlockPlan:
    """Plan with settings that free blocks, in bf16 if not said otherwise."""
    plan = plan_blocks(parse_config(settings), head_size, itemsize, block_size)
    assert plan is not None
    return plan
