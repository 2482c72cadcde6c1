"""Plans of blocks, as a server with these settings has them."""

from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig


def plan_of(quant: str, ratio: float = 0.5, head_size: int = 128) -> BlockPlan:
    """Blocks of a format for elements of 2 bytes, a share of the key channels pruned.

    Raises:
        ValueError: If they are those of plain vLLM.
    """
    config = ThinkConfig.model_validate({"kv_channel_prune": ratio, "kv_quant": quant})
    plan = plan_blocks(config, head_size, 2)
    if plan is None:
        raise ValueError(f"{quant} at {ratio} prunes nothing")
    return plan
