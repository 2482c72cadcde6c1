"""``think-vllm plan`` with ``--kv-select static``."""

import argparse
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.hooks.engine import describe_engine
from think_vllm.hooks.static_engine import check_static_model
from think_vllm.plan.channel_tables import ModelShape, load_tables
from think_vllm.plan.settings import ThinkConfig, prune_flags
from think_vllm.plan.static_plan import StaticPlan
from think_vllm.plan.summary import budget_text, static_fields, static_summary


def static_plan_text(
    namespace: argparse.Namespace, config: ThinkConfig, model_config: Any, ranks: list[Any]
) -> tuple[dict[str, Any], list[str]]:
    """The plan of static pruning: its fields, and its lines.

    Raises:
        ThinkError: If the model cannot be served with it.
    """
    check_static_model(model_config)
    assert config.kv_channel_tables_file is not None  # parse_config
    load_tables(config.kv_channel_tables_file, ModelShape.of(model_config))
    head_size = model_config.get_head_size()
    made = describe_engine(config, model_config, namespace.block_size).static
    if made is None:
        raise ThinkError(
            f"{prune_flags(config)} prunes no channel at head size {head_size}; nothing to plan. "
            "Give a larger ratio"
        )
    heads = model_config.get_num_kv_heads(ranks[0])
    stages = [model_config.get_layers_start_end_indices(rank) for rank in ranks]
    layers = max(end - start for start, end in stages)
    fields = static_fields(made) | static_budget(
        made, heads, layers, namespace.memory, namespace.context_length
    )
    fields["num_ranks"] = ranks[0].world_size
    return fields, [*static_summary(made, namespace.enable_prefix_caching), budget_text(fields)]


def static_budget(
    made: StaticPlan, num_kv_heads: int, num_layers: int, memory_bytes: int, context_len: int
) -> dict[str, Any]:
    """What fits into a memory budget with static pruning; arguments as for ``budget_fields``."""
    tokens = made.block_size * num_kv_heads * num_layers
    per_request = -(-context_len // made.block_size)
    # vLLM keeps block 0 as the null block.
    plain, pruned = (
        max(0, memory_bytes // (tokens * size) - 1)
        for size in (made.dense_bytes_per_token_head, made.bytes_per_token_head)
    )
    return {
        "num_kv_heads": num_kv_heads,
        "num_layers": num_layers,
        "num_window_layers": 0,
        "memory_bytes": memory_bytes,
        "num_blocks": pruned,
        "context_length": context_len,
        "plain_tokens": plain * made.block_size,
        "thin_tokens": pruned * made.block_size,
        "plain_requests": plain // per_request,
        "thin_requests": pruned // per_request,
        "effective_multiple": made.capacity_multiple,
    }
