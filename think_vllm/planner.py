"""Choose how many dense blocks become how many thin ones, and how many channels they keep.

A span of ``span_blocks`` dense blocks becomes ``thin_blocks`` thin ones. Block counts are
whole numbers, so not every ratio is worth its exact share: the planner looks through all
spans up to a length and takes the one that saves most at a context of ``kv_plan_context`` tokens,
dense tail included.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from think_vllm.config import ThinkConfig
from think_vllm.errors import WAY_OUT, ThinkError
from think_vllm.formats import GROUP_SIZES, BlockFormat
from think_vllm.layout import MAX_HEAD_SIZE, ThinLayout, max_key_channels
from think_vllm.spans import SpanRule

#: Block sizes that the planner may choose from when the user names none.
BLOCK_SIZES = (16, 32, 48, 64, 80, 96, 112, 128)
#: Spans longer than this would leave too much of a context dense.
MAX_SPAN_BLOCKS = 32
MAX_SPAN_TOKENS = 2048
#: Head sizes and block sizes are multiples of this: one vector of the kernels.
SIZE_MULTIPLE = 16
#: Key rows of a thin block are whole multiples of this many tokens: whole bytes of 2-bit codes.
TOKEN_ALIGNMENT = 4
#: Rows of integer codes are read in vectors of this many.
INTEGER_HEAD_MULTIPLE = 32
#: Plans whose savings are at least this share of the best one's count as equally good.
SAVINGS_TOLERANCE = 0.995
#: Share of the head size by which a plan may prune more than requested, to fit its blocks.
CHANNEL_TOLERANCE = 0.025


@dataclass(frozen=True)
class BlockPlan:
    """How the KV blocks of one model are pruned and quantized.

    Args:
        config: What was asked for.
        head_size: Channels of a key head.
        key_channels: Kept key channels.
        block_size: Tokens of a dense block.
        span_blocks: Dense blocks that are compacted together.
        thin_blocks: Blocks that they become.
        thin_block_tokens: Tokens of a thin block (the last one of a span may hold fewer).
        itemsize: Bytes of a cache element.
    """

    config: ThinkConfig
    head_size: int
    key_channels: int
    block_size: int
    span_blocks: int
    thin_blocks: int
    thin_block_tokens: int
    itemsize: int

    @cached_property
    def layout(self) -> ThinLayout:
        """Byte layout of a thin block."""
        return ThinLayout(
            head_size=self.head_size,
            key_channels=self.key_channels,
            block_tokens=self.thin_block_tokens,
            block_size=self.block_size,
            itemsize=self.itemsize,
            format=self.config.format,
            group=self.config.kv_quant_group,
        )

    @cached_property
    def rule(self) -> SpanRule:
        """When a span is thin."""
        return SpanRule(
            block_size=self.block_size,
            span_blocks=self.span_blocks,
            thin_blocks=self.thin_blocks,
            recent_window=self.config.kv_recent_window,
            prune_decode=self.config.kv_prune_decode,
            prune_prefill=self.config.kv_prune_prefill,
            delay_prompt=self.config.kv_prefix_cache == "dense"
            and not self.config.kv_prune_prefill,
        )

    @property
    def observation_window(self) -> int:
        """Last prompt tokens that choose channels; 0 if there is nothing to choose."""
        return self.config.kv_observation_window if self.prunes else 0

    @property
    def format(self) -> BlockFormat:
        """How thin blocks are coded."""
        return self.config.format

    @property
    def prunes(self) -> bool:
        """Whether key channels are left out."""
        return self.key_channels < self.head_size

    @property
    def requested_ratio(self) -> float:
        """Fraction of key channels that was asked to go."""
        return self.config.kv_channel_prune

    @property
    def actual_ratio(self) -> float:
        """Fraction of key channels that goes."""
        return 1.0 - self.key_channels / self.head_size

    @property
    def span_tokens(self) -> int:
        """Tokens of a span."""
        return self.rule.span_tokens

    @property
    def dense_bytes_per_token_head(self) -> float:
        """Bytes of one token in one KV head, keys and values, before compaction."""
        return float(2 * self.head_size * self.itemsize)

    @property
    def thin_bytes_per_token_head(self) -> float:
        """Bytes of one token in one KV head after compaction: tables and padding included."""
        return self.dense_bytes_per_token_head * self.thin_blocks / self.span_blocks

    @property
    def capacity_multiple(self) -> float:
        """Compacted tokens that fit where one dense token fits."""
        return self.span_blocks / self.thin_blocks

    @property
    def key_bytes_per_token_head(self) -> float:
        """Bytes of one token's keys in one KV head after compaction, factors and table included."""
        table = self.key_channels if self.layout.has_table else 0
        return (self.layout.keys.content_bytes + table) / self.thin_block_tokens

    @property
    def value_bytes_per_token_head(self) -> float:
        """Bytes of one token's values in one KV head after compaction, factors included."""
        return self.layout.values.content_bytes / self.thin_block_tokens

    @property
    def waste(self) -> float:
        """Share of a compacted span's bytes that carries nothing: padding, unfilled tokens."""
        used = self.key_bytes_per_token_head + self.value_bytes_per_token_head
        return 1.0 - used / self.thin_bytes_per_token_head

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds once its prompt has ended.

        Counts a context that is all prompt, or all compacted as it grew.
        """
        spans = self.rule.prompt_spans(num_tokens)
        dense = -(-num_tokens // self.block_size)
        return dense - spans * (self.span_blocks - self.thin_blocks)

    def effective_multiple(self, num_tokens: int) -> float:
        """Requests of ``num_tokens`` tokens that fit where one dense request fits.

        The recent window and, on average, half a span stay dense.
        """
        dense_tail = min(num_tokens, self.config.kv_recent_window + self.span_tokens / 2)
        thin = (num_tokens - dense_tail) / self.capacity_multiple
        return num_tokens / (thin + dense_tail)


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
        The plan, or None if the ratio is too small to prune a single channel and nothing is
        quantized.

    Raises:
        ThinkError: If no plan fits, with the nearest settings that do.
    """
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ThinkError(
            f"thin KV blocks: the model's head size is {head_size}; "
            f"channel tables hold one byte per channel, so at most {MAX_HEAD_SIZE} is possible. "
            f"{WAY_OUT}"
        )
    if pruned_channels(config.kv_channel_prune, head_size) == 0 and config.kv_quant == "none":
        return None
    for name, value, way_out in (
        ("the model's head size", head_size, WAY_OUT),
        ("--block-size", block_size, "Leave it out for the best one"),
    ):
        if value is not None and (value < 1 or value % SIZE_MULTIPLE):
            raise ThinkError(
                f"thin KV blocks: {name} is {value}; the kernels need a multiple of "
                f"{SIZE_MULTIPLE}. {way_out}"
            )
    _check_groups(config, head_size)
    sizes = block_sizes if block_size is None else (block_size,)
    candidates = [plan for size in sizes for plan in _plans(config, head_size, itemsize, size)]
    if not candidates:
        raise ThinkError(_no_plan(config, head_size, itemsize, block_size, block_sizes))
    best = _best(candidates)
    if block_size is None:
        # Among plans for its block size alone another one may win; whoever plans again for the
        # chosen block size, as every worker does, must come to the same plan.
        return plan_blocks(config, head_size, itemsize, best.block_size, block_sizes)
    return best


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
    # Whoever asks for no pruning gets none.
    least = wanted - (max(1, round(CHANNEL_TOLERANCE * head_size)) if pruned else 0)
    for span_blocks in range(2, min(MAX_SPAN_BLOCKS, MAX_SPAN_TOKENS // block_size) + 1):
        span_tokens = span_blocks * block_size
        for thin_blocks in range(1, span_blocks):
            tokens = -(-span_tokens // thin_blocks)
            tokens = -(-tokens // TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT
            if (thin_blocks - 1) * tokens >= span_tokens:
                continue
            fitting = max_key_channels(
                head_size, tokens, block_size, itemsize, config.format, config.kv_quant_group
            )
            channels = min(wanted, fitting)
            if channels < max(1, least):
                continue
            yield BlockPlan(
                config=config,
                head_size=head_size,
                key_channels=channels,
                block_size=block_size,
                span_blocks=span_blocks,
                thin_blocks=thin_blocks,
                thin_block_tokens=tokens,
                itemsize=itemsize,
            )


def _best(candidates: Sequence[BlockPlan]) -> BlockPlan:
    """Most savings, but among nearly equal ones most channels."""
    enough = SAVINGS_TOLERANCE * max(_savings(plan) for plan in candidates)
    return max(
        (plan for plan in candidates if _savings(plan) >= enough),
        key=lambda plan: (plan.key_channels, _savings(plan), -plan.span_tokens),
    )


def _savings(plan: BlockPlan) -> float:
    """Capacity multiple of a request of ``kv_plan_context`` tokens, unfilled blocks included.

    On average half a span is not full yet, nor half a block. The recent window is left out:
    it is the same for every candidate, and a plan should not change with it.
    """
    context = plan.config.kv_plan_context
    dense_tail = min(context, plan.span_tokens / 2)
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
    for percent in range(math.floor(config.kv_channel_prune * 100 + 1e-9) + 1, 81):
        more = config.model_copy(update={"kv_channel_prune": percent / 100})
        if any(next(_plans(more, head_size, itemsize, size), None) for size in block_sizes):
            return (
                f"{who}: too little is pruned to free a block in any span of up to "
                f"{MAX_SPAN_BLOCKS} blocks; the smallest ratio that does is {percent / 100}, "
                "or leave the flag out"
            )
    return f"{who}: no plan fits. {WAY_OUT}"
