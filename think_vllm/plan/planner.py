"""Select how many dense blocks become how many thin ones, and how many channels they keep.

A span of ``span_blocks`` dense blocks becomes ``thin_blocks`` thin ones. Block counts are
whole numbers, so not every ratio is worth its exact share: the planner looks through all
spans up to a length and takes the one that saves most at a context of ``kv_plan_context`` tokens,
dense tail included.
"""

import math
from collections.abc import Iterator, Sequence

from think_vllm.errors import REMEDY, ThinkError
from think_vllm.plan.block_plan import BlockPlan, span_rule
from think_vllm.plan.formats import GROUP_SIZES, Encoding
from think_vllm.plan.layout import MAX_HEAD_SIZE, max_key_channels
from think_vllm.plan.settings import ThinkConfig

__all__ = ["BlockPlan", "plan_blocks", "pruned_channels"]

#: Block sizes that the planner may select from when the user names none.
BLOCK_SIZES = (16, 32, 48, 64, 80, 96, 112, 128)
#: Spans longer than this would leave too much of a context dense.
MAX_SPAN_BLOCKS = 32
MAX_SPAN_TOKENS = 2048
#: Head sizes and block sizes are multiples of this: one vector of the kernels.
SIZE_MULTIPLE = 16
#: Thin blocks hold whole multiples of this many tokens; quantized ones of twice as many, and of
#: whole units of keys: kernels for GPUs read as many at once.
TOKEN_ALIGNMENT = 4
#: Value rows of a thin block are whole multiples of this many channels: whole bytes of 2-bit codes.
CHANNEL_ALIGNMENT = 4
#: Rows of integer codes are read in vectors of this many.
INTEGER_HEAD_MULTIPLE = 32
#: Plans whose savings are at least this share of the best one's count as equally good.
SAVINGS_TOLERANCE = 0.995
#: Share of the head size by which a plan may prune more than requested, to fit its blocks.
CHANNEL_TOLERANCE = 0.025
#: Plans that use at least this share of a budget of tokens count as using all of it.
USED_SHARE = 0.9


def pruned_channels(ratio: float, head_size: int) -> int:
    """Channels that ``ratio`` prunes: ``floor(ratio * D)``, as in the authors' code."""
    return math.floor(ratio * head_size + 1e-9)


def plan_blocks(
    config: ThinkConfig,
    head_size: int,
    itemsize: int,
    block_size: int | None = None,
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> BlockPlan | None:
    """Find the best plan.

    Args:
        config: What is asked for.
        head_size: Channels of a key head (values have as many).
        itemsize: Bytes of a cache element: 2 for bf16 and fp16, 4 for fp32.
        block_size: Tokens of a block if the user chose them, else None.
        block_sizes: Block sizes that the platform supports, used if ``block_size`` is None.

    Returns:
        The plan, or None if the ratios are too small to prune a single channel and nothing is
        quantized nor evicted.

    Raises:
        ThinkError: If no plan fits, with the nearest settings that do.
    """
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ThinkError(
            f"thin KV blocks: the model's head size is {head_size}; "
            f"channel tables hold one byte per channel, so at most {MAX_HEAD_SIZE} is possible. "
            f"{REMEDY}"
        )
    if config.evicts:
        # Thin spans that hold what one prompt asked for are of no use to another.
        config = config.model_copy(update={"kv_prefix_cache": "dense"})
    elif not _shrinks(config, head_size):
        return None
    if config.limits_loss:
        # Prompts are compacted a step after their end, as there.
        config = config.model_copy(update={"kv_prefix_cache": "dense"})
    for name, value, remedy in (
        ("the model's head size", head_size, REMEDY),
        ("--block-size", block_size, "Leave it out for the best one"),
    ):
        if value is not None and (value < 1 or value % SIZE_MULTIPLE):
            raise ThinkError(
                f"thin KV blocks: {name} is {value}; the kernels need a multiple of "
                f"{SIZE_MULTIPLE}. {remedy}"
            )
    _check_groups(config, head_size)
    sizes = block_sizes if block_size is None else (block_size,)
    candidates = [plan for size in sizes for plan in _plans(config, head_size, itemsize, size)]
    if not candidates:
        raise ThinkError(_no_plan(config, head_size, itemsize, block_size, block_sizes))
    best = _best(fit_budget(candidates))
    if block_size is None:
        # Among plans for its block size alone another one may win; planning again for the
        # chosen block size, as every worker does, must come to the same plan.
        return plan_blocks(config, head_size, itemsize, best.block_size, block_sizes)
    return best


def _shrinks(config: ThinkConfig, head_size: int) -> bool:
    """Whether anything of a token goes."""
    ratio = max(config.kv_channel_prune, config.kv_value_prune)
    return pruned_channels(ratio, head_size) > 0 or config.kv_quant != "none"


def _check_groups(config: ThinkConfig, head_size: int) -> None:
    if not config.format.has_groups:
        return
    who = f"--kv-quant {config.kv_quant}: the model's head size is {head_size}"
    if head_size % INTEGER_HEAD_MULTIPLE:
        raise ThinkError(
            f"{who}; integer codes need a multiple of {INTEGER_HEAD_MULTIPLE}. "
            "Use --kv-quant fp8, or leave it out"
        )
    if head_size % config.kv_quant_group:
        fitting = [size for size in GROUP_SIZES if head_size % size == 0]
        raise ThinkError(
            f"{who}, no multiple of --kv-quant-group {config.kv_quant_group}; "
            f"use --kv-quant-group {' or '.join(map(str, fitting))}"
        )


def _plans(
    config: ThinkConfig, head_size: int, itemsize: int, block_size: int
) -> Iterator[BlockPlan]:
    pruned = pruned_channels(config.kv_channel_prune, head_size)
    wanted = head_size - pruned
    # Without a ratio no channel is pruned.
    least = wanted - (max(1, round(CHANNEL_TOLERANCE * head_size)) if pruned else 0)
    if not _shrinks(config, head_size):
        # Only evicted: a thin block is a dense one, byte by byte.
        rule = span_rule(config, block_size, 1, 1)
        yield BlockPlan(config, head_size, head_size, head_size, rule, block_size, itemsize)
        return
    for value_channels in _value_channels(config.kv_value_prune, head_size):
        for plan in _spans(config, head_size, itemsize, block_size, wanted, value_channels):
            if plan.key_channels >= max(1, least):
                yield plan


def _value_channels(ratio: float, head_size: int) -> Iterator[int]:
    """How many value channels may be kept: those asked for, or up to ``CHANNEL_ALIGNMENT`` less."""
    pruned = pruned_channels(ratio, head_size)
    if pruned == 0:
        yield head_size
        return
    wanted = head_size - pruned
    most = wanted // CHANNEL_ALIGNMENT * CHANNEL_ALIGNMENT
    yield from range(most, max(1, wanted - CHANNEL_ALIGNMENT) - 1, -CHANNEL_ALIGNMENT)


def _spans(
    config: ThinkConfig,
    head_size: int,
    itemsize: int,
    block_size: int,
    wanted: int,
    value_channels: int,
) -> Iterator[BlockPlan]:
    """All spans that free a block, with as many of the wanted key channels as fit."""
    keys = config.format.keys
    multiple, rows = token_multiple(keys), 1 if keys is Encoding.PLAIN else 2
    for span_blocks in range(2, min(MAX_SPAN_BLOCKS, MAX_SPAN_TOKENS // block_size) + 1):
        span_tokens = span_blocks * block_size
        for thin_blocks in range(1, span_blocks):
            tokens = -(-span_tokens // thin_blocks)
            tokens = -(-tokens // multiple) * multiple
            if (thin_blocks - 1) * tokens >= span_tokens:
                continue
            fitting = max_key_channels(
                head_size, tokens, block_size, itemsize, config.format, config.kv_quant_group,
                value_channels,
            )  # fmt: skip
            # Two rows of codes make a unit.
            kept = min(wanted, fitting) // rows * rows
            if kept == 0:
                continue
            yield BlockPlan(
                config=config,
                head_size=head_size,
                key_channels=kept,
                value_channels=value_channels,
                rule=span_rule(config, block_size, span_blocks, thin_blocks),
                thin_block_tokens=tokens,
                itemsize=itemsize,
            )


def token_multiple(keys: Encoding) -> int:
    """Tokens of which a thin block holds a whole multiple."""
    return TOKEN_ALIGNMENT if keys is Encoding.PLAIN else max(2 * TOKEN_ALIGNMENT, 32 // keys.value)


def _best(candidates: Sequence[BlockPlan]) -> BlockPlan:
    """Most savings, but among nearly equal ones most channels."""
    enough = SAVINGS_TOLERANCE * max(_savings(plan) for plan in candidates)
    return max(
        (plan for plan in candidates if _savings(plan) >= enough),
        key=lambda plan: (
            plan.key_channels + plan.value_channels,
            _savings(plan),
            -plan.span_tokens,
        ),
    )


def _savings(plan: BlockPlan) -> float:
    """Capacity multiple of a request of ``kv_plan_context`` tokens, unfilled blocks included.

    On average half a span is not full yet, nor half a block. The recent window is left out:
    it is the same for every candidate, and a plan should not change with it.
    """
    context = float(plan.config.kv_plan_context)
    dense_tail = plan.span_tokens / 2
    if plan.config.evicts:
        context = min(context, plan.kept_tokens + dense_tail)
    dense_tail = min(context, dense_tail)
    thin = (context - dense_tail) / plan.capacity_multiple
    return context / (thin + dense_tail + plan.block_size / 2)


def _no_plan(
    config: ThinkConfig,
    head_size: int,
    itemsize: int,
    block_size: int | None,
    block_sizes: Sequence[int],
) -> str:
    asked = [f"--kv-channel-prune {config.kv_channel_prune}"] if config.kv_channel_prune else []
    asked += [f"--kv-value-prune {config.kv_value_prune}"] if config.kv_value_prune else []
    asked += [f"--kv-quant {config.kv_quant}"] if config.kv_quant != "none" else []
    who = f"{' '.join(asked)} at head size {head_size}"
    if block_size is not None:
        fitting = [size for size in block_sizes if any(_plans(config, head_size, itemsize, size))]
        if fitting:
            return (
                f"{who}: no span of up to {MAX_SPAN_BLOCKS} blocks of --block-size {block_size} "
                f"tokens frees a block; use --block-size {' or '.join(map(str, fitting))}, "
                "or leave it out"
            )
    name = "kv_channel_prune" if config.kv_channel_prune else "kv_value_prune"
    for percent in range(math.floor(getattr(config, name) * 100 + 1e-9) + 1, 81):
        more = config.model_copy(update={name: percent / 100})
        if any(next(_plans(more, head_size, itemsize, size), None) for size in block_sizes):
            return (
                f"{who}: too little is pruned to free a block in any span of up to "
                f"{MAX_SPAN_BLOCKS} blocks; the smallest ratio that does is {percent / 100}, "
                f"or leave {'the flags' if len(asked) > 1 else 'the flag'} out"
            )
    return f"{who}: no plan fits. {REMEDY}"


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
    used = [(plan.kept_tokens, plan) for plan in candidates]
    enough = min(USED_SHARE * budget, max(kept for kept, _ in used))
    return [plan for kept, plan in used if kept >= enough]
