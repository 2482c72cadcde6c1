"""Say what a plan means: the start-up log, and the fields of ``think-vllm plan``."""

from typing import Any

from think_vllm.plan.block_plan import ChannelPlan
from think_vllm.plan.formats import Encoding
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan

#: Context lengths, in units of 1,024 tokens, at which whole requests are counted.
CONTEXTS = (2, 8, 32)
#: A plan for another context length is worth a line if it holds so many times the requests.
HINT_GAIN = 1.05

#: For the start-up log, after the summary of blocks that become thin.
COUNTED_DENSE = (
    "the KV cache size and concurrency that vLLM prints count dense tokens; multiply by these"
)

_ENCODINGS = {
    Encoding.PLAIN: "as computed",
    Encoding.FP8: "fp8",
    Encoding.INT4: "4-bit",
    Encoding.INT2: "2-bit",
}


def plan_summary(plan: BlockPlan, prefix_caching: bool) -> list[str]:
    """The plan in a few lines that a person reads.

    Args:
        plan: The plan.
        prefix_caching: Whether prefixes are cached.
    """
    dense, thin = plan.dense_bytes_per_token_head, plan.thin_bytes_per_token_head
    prefixes = ""
    if prefix_caching:
        form = "thin" if plan.config.kv_prefix_cache == "thin" else "as dense copies"
        prefixes = f", prefixes cached {form}"
    return [
        f"{_channels(plan)}; {_encodings(plan)}",
        f"{_blocks(plan)} (span {plan.span_tokens} tokens; "
        f"recent window {plan.config.kv_recent_window}, "
        f"observation window {plan.config.kv_observation_window}, decoded spans "
        f"{'compacted too' if plan.rule.prune_decode else 'stay dense'}"
        f"{', at the end of every chunk of a prompt' if plan.config.kv_prune_prefill else ''}"
        f"{prefixes})",
        *_eviction(plan),
        *_guard(plan),
        f"bytes per token and KV head: {dense:.0f} dense, {thin:.1f} thin (keys "
        f"{plan.key_bytes_per_token_head:.1f}, values {plan.value_bytes_per_token_head:.1f}, "
        f"waste {100 * plan.waste:.1f} %): x{plan.capacity_multiple:.3f}; whole requests "
        + ", ".join(f"x{plan.effective_multiple(1024 * k):.2f} at {k}k" for k in CONTEXTS)
        + f" tokens; planned for {plan.config.kv_plan_context}",
    ]


def static_summary(plan: StaticPlan, prefix_caching: bool) -> list[str]:
    """The same for static pruning. vLLM counts such blocks as they are, so its figures hold."""
    dense, pruned = plan.dense_bytes_per_token_head, plan.bytes_per_token_head
    return [
        f"{_channels(plan)}, the same ones for all tokens of a model "
        f"({plan.config.kv_channel_tables_file}); {_encodings(plan)}"
        f"{' with scales of each token' if plan.is_quantized else ''}",
        f"blocks of {plan.block_size} tokens hold kept channels alone, from the first token on: "
        f"nothing is compacted{', and prefixes are shared exactly' if prefix_caching else ''}",
        f"bytes per token and KV head: {dense} dense, {pruned} pruned: "
        f"x{plan.capacity_multiple:.3f} at every length; the KV cache size and concurrency "
        "that vLLM prints count this already",
    ]


def static_fields(plan: StaticPlan) -> dict[str, Any]:
    """A plan of static pruning as flat, JSON-ready fields; those of ``plan_fields`` that it has."""
    return {
        **_channel_fields(plan),
        "select": plan.config.kv_select,
        "channel_tables_file": plan.config.kv_channel_tables_file,
        "block_size": plan.block_size,
        "dense_bytes_per_token_head": plan.dense_bytes_per_token_head,
        "thin_bytes_per_token_head": plan.bytes_per_token_head,
        "waste": 0.0,
        "capacity_multiple": plan.capacity_multiple,
        **{f"effective_multiple_{k}k": plan.capacity_multiple for k in CONTEXTS},
    }


def context_hint(plan: BlockPlan, tokens: int, block_size: int | None = None) -> list[str]:
    """A line if a plan made for requests of ``tokens`` tokens saves clearly more there.

    Args:
        plan: The plan as it is.
        tokens: Of a request.
        block_size: Tokens of a block if the user chose them, else None.
    """
    least = ThinkConfig.model_fields["kv_plan_context"].metadata[0].ge
    if tokens < least:
        return []
    config = plan.config.model_copy(update={"kv_plan_context": tokens})
    other = plan_blocks(config, plan.head_size, plan.itemsize, block_size)
    assert other is not None  # the same ratio prunes as many channels
    now, then = plan.effective_multiple(tokens), other.effective_multiple(tokens)
    if then < HINT_GAIN * now:
        return []
    return [
        f"--kv-plan-context {config.kv_plan_context} would make it x{then:.2f} instead of "
        f"x{now:.2f} for requests of {tokens} tokens"
    ]


def never_thin(plan: BlockPlan, longest: int) -> list[str]:
    """A line if no request up to a model's length gives up a block.

    Args:
        plan: The plan.
        longest: Tokens of the longest request, prompt and answer.
    """
    least = plan.rule.shortest_saving
    if least <= longest:
        return []
    recent = f"{plan.config.kv_recent_window} recent tokens (--kv-recent-window)"
    if plan.config.evicts and not plan.rule.shrinks:
        why = f"{plan.kept_tokens} old tokens are kept (--kv-evict-budget) beside {recent}"
    else:
        why = f"The first {plan.span_tokens} tokens shrink once {recent} follow them"
    return [
        f"nothing is saved: no request of up to {longest} tokens, the longest that the model is "
        f"served with, gives up a block. {why}, so requests must have {least} tokens. Lower these, "
        "give a smaller --kv-plan-context for shorter spans, or raise --max-model-len"
    ]


def plan_fields(plan: BlockPlan, prefix_caching: bool) -> dict[str, Any]:
    """The plan as flat, JSON-ready fields.

    Args:
        plan: The plan.
        prefix_caching: Whether prefixes are cached.
    """
    return {
        **_channel_fields(plan),
        "kv_quant_group": plan.config.kv_quant_group if plan.format.has_groups else None,
        "block_size": plan.block_size,
        "span_blocks": plan.span_blocks,
        "thin_blocks": plan.thin_blocks,
        "span_tokens": plan.span_tokens,
        "thin_block_tokens": plan.thin_block_tokens,
        "unused_bytes_per_thin_block_head": plan.layout.run_bytes - plan.layout.used_bytes,
        "recent_window": plan.rule.recent_window,
        "observation_window": plan.config.kv_observation_window,
        "prune_decode": plan.rule.prune_decode,
        "prune_prefill": plan.rule.prune_prefill,
        "prefix_cache": plan.config.kv_prefix_cache if prefix_caching else None,
        "max_loss": plan.config.kv_prune_max_loss if plan.limits_loss else None,
        "plan_context": plan.config.kv_plan_context,
        "select": plan.config.kv_select if plan.prunes else None,
        "channel_tables": plan.config.kv_channel_tables if plan.prunes_keys else None,
        "evict": plan.config.kv_evict,
        "evict_budget": plan.kept_tokens if plan.config.evicts else None,
        "dense_bytes_per_token_head": plan.dense_bytes_per_token_head,
        "thin_bytes_per_token_head": plan.thin_bytes_per_token_head,
        "key_bytes_per_token_head": plan.key_bytes_per_token_head,
        "value_bytes_per_token_head": plan.value_bytes_per_token_head,
        "waste": plan.waste,
        "capacity_multiple": plan.capacity_multiple,
        **{f"effective_multiple_{k}k": plan.effective_multiple(1024 * k) for k in CONTEXTS},
    }


def _blocks(plan: BlockPlan) -> str:
    if plan.span_blocks == plan.thin_blocks:  # only evicted
        return f"blocks of {plan.block_size} tokens hold kept tokens as they are"
    return f"{plan.span_blocks} blocks of {plan.block_size} tokens become {plan.thin_blocks}"


def _channel_fields(plan: ChannelPlan) -> dict[str, Any]:
    return {
        "head_size": plan.head_size,
        "key_channels": plan.key_channels,
        "value_channels": plan.value_channels,
        "requested_ratio": plan.requested_ratio,
        "actual_ratio": plan.actual_ratio,
        "requested_value_ratio": plan.config.kv_value_prune,
        "actual_value_ratio": plan.actual_value_ratio,
        "kv_quant": plan.format.name,
    }


def _eviction(plan: BlockPlan) -> list[str]:
    if not plan.config.evicts:
        return []
    return [
        f"each KV head keeps {plan.kept_tokens} old tokens of a prompt at most (budget "
        f"{plan.config.kv_evict_budget}, {plan.config.kv_evict}); what is decoded is not evicted"
    ]


def _guard(plan: BlockPlan) -> list[str]:
    if not plan.limits_loss:
        return []
    return [
        f"requests whose pruned key channels have more than {plan.config.kv_prune_max_loss:g} of "
        "the scores stay dense: what fits depends on how many these are"
    ]


def _channels(plan: BlockPlan | StaticPlan) -> str:
    keys = f"key channels all {plan.head_size}"
    if plan.prunes_keys:
        kept = f"{plan.key_channels} of {plan.head_size}"
        keys = f"key channels {kept} {_ratios(plan.actual_ratio, plan.requested_ratio)}"
        keys += "" if plan.config.kv_select == "think" else f" by {plan.config.kv_select}"
        keys += " for each span" if plan.selects_per_span else ""
    if not plan.prunes_values:
        return keys
    kept = f"{plan.value_channels} of {plan.head_size}"
    ratios = _ratios(plan.actual_value_ratio, plan.config.kv_value_prune)
    # Norms of keys say nothing about values: they are chosen as usual.
    ratios += " by random" if plan.config.kv_select == "random" else ""
    return f"{keys}, value channels {kept} {ratios}"


def _ratios(actual: float, requested: float) -> str:
    return f"(pruned: {actual:.3f}, requested {requested:g})"


def _encodings(plan: ChannelPlan) -> str:
    keys, values = _ENCODINGS[plan.format.keys], _ENCODINGS[plan.format.values]
    same = f"keys and values {keys}" if keys == values else f"keys {keys}, values {values}"
    if not plan.format.has_groups:
        return same
    return f"{same} in groups of {plan.config.kv_quant_group} ({plan.format.name})"


def budget_text(fields: dict[str, Any]) -> str:
    """What fits into a memory budget, as a line of ``think-vllm plan``."""
    share = (
        f" on each of {fields['num_ranks']} ranks (KV heads {fields['num_kv_heads']}, "
        f"layers {fields['num_layers']})"
        if fields["num_ranks"] > 1
        else ""
    )
    return (
        f"{fields['memory_bytes'] / 2**30:.2f} GiB of KV cache{share}, requests of "
        f"{fields['context_length']} tokens: {fields['plain_requests']} plain, "
        f"{fields['thin_requests']} thin; of about that length, on average, "
        f"{fields['plain_tokens']} and {fields['thin_tokens']} tokens"
    )
