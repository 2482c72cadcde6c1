"""How the KV blocks of a model are pruned and quantized, and what that is worth."""

from dataclasses import dataclass
from functools import cached_property

from think_vllm.plan.formats import BlockFormat
from think_vllm.plan.layout import ThinLayout
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.spans import SpanRule


@dataclass(frozen=True)
class ChannelPlan:
    """How many channels of a head are kept."""

    config: ThinkConfig  # what was asked for
    head_size: int  # channels of a key head
    key_channels: int  # kept key channels
    value_channels: int  # kept value channels

    @property
    def format(self) -> BlockFormat:
        """How keys and values are stored."""
        return self.config.format

    @property
    def prunes_keys(self) -> bool:
        """Whether key channels are left out."""
        return self.key_channels < self.head_size

    @property
    def prunes_values(self) -> bool:
        """Whether value channels are left out."""
        return self.value_channels < self.head_size

    @property
    def prunes(self) -> bool:
        """Whether channels are left out, and so have to be chosen."""
        return self.prunes_keys or self.prunes_values

    @property
    def requested_ratio(self) -> float:
        """Fraction of key channels that was asked to go."""
        return self.config.kv_channel_prune

    @property
    def actual_ratio(self) -> float:
        """Fraction of key channels that goes."""
        return 1.0 - self.key_channels / self.head_size

    @property
    def actual_value_ratio(self) -> float:
        """Fraction of value channels that goes."""
        return 1.0 - self.value_channels / self.head_size


def span_rule(config: ThinkConfig, block_size: int, span_blocks: int, thin_blocks: int) -> SpanRule:
    """The rule that a config makes of spans.

    Args:
        config: What was asked for.
        block_size: Tokens of a dense block.
        span_blocks: Dense blocks that are compacted together.
        thin_blocks: Blocks that they become.
    """
    budget = config.kv_evict_budget // (block_size * span_blocks)
    return SpanRule(
        block_size=block_size,
        span_blocks=span_blocks,
        thin_blocks=thin_blocks,
        recent_window=config.kv_recent_window,
        # What is only evicted has nothing to gain from spans that fill while decoding.
        prune_decode=config.kv_prune_decode and thin_blocks < span_blocks,
        prune_prefill=config.kv_prune_prefill,
        delay_prompt=config.kv_prefix_cache == "dense" and not config.kv_prune_prefill,
        budget_spans=budget if config.evicts else None,
    )


@dataclass(frozen=True)
class BlockPlan(ChannelPlan):
    """How the KV blocks of one model are pruned and quantized; see ``ChannelPlan``, too."""

    rule: SpanRule  # which blocks are compacted together, and when
    thin_block_tokens: int  # tokens of a thin block (the last one of a span may hold fewer)
    itemsize: int  # bytes of a cache element

    @property
    def block_size(self) -> int:
        """Tokens of a dense block."""
        return self.rule.block_size

    @property
    def span_blocks(self) -> int:
        """Dense blocks that are compacted together."""
        return self.rule.span_blocks

    @property
    def thin_blocks(self) -> int:
        """Blocks that they become."""
        return self.rule.thin_blocks

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
            value_channels=self.value_channels,
        )

    @property
    def selection_window(self) -> int:
        """Last prompt tokens that select channels, or tokens to keep."""
        return self.config.kv_observation_window if self.prunes or self.config.evicts else 0

    @property
    def observation_window(self) -> int:
        """Last prompt tokens that select channels; 0 if there is nothing to select."""
        return self.config.kv_observation_window if self.prunes else 0

    @property
    def eviction_window(self) -> int | None:
        """Last prompt tokens that select tokens to keep; None for the whole prompt."""
        return self.config.kv_observation_window if self.config.kv_evict == "snapkv" else None

    @property
    def limits_loss(self) -> bool:
        """Whether requests whose keys would lose too much stay dense."""
        return self.config.limits_loss and self.prunes_keys

    @property
    def selects_per_span(self) -> bool:
        """Whether each span of a prompt has key channels of its own."""
        return self.prunes_keys and self.config.kv_channel_tables == "span"

    @property
    def kept_channels(self) -> int:
        """``K``: entries of a head's row of kept channels.

        Those of keys, all of them if none is pruned; then, if some are pruned, those of values.
        """
        return self.key_channels + (self.value_channels if self.prunes_values else 0)

    @property
    def span_tokens(self) -> int:
        """Tokens of a span."""
        return self.rule.span_tokens

    @property
    def kept_tokens(self) -> int:
        """Old tokens of a prompt that each KV head keeps at most: the budget's whole spans."""
        return self.config.kv_evict_budget // self.span_tokens * self.span_tokens

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
        """Bytes of one token's keys in one KV head after compaction, scales and table included."""
        table = self.key_channels if self.layout.has_table else 0
        return (self.layout.keys.content_bytes + table) / self.thin_block_tokens

    @property
    def value_bytes_per_token_head(self) -> float:
        """Bytes of one token's values in one KV head after compaction, as for keys."""
        table = self.value_channels if self.layout.has_value_table else 0
        return (self.layout.values.content_bytes + table) / self.thin_block_tokens

    @property
    def waste(self) -> float:
        """Share of a compacted span's bytes that carries nothing: padding, unfilled tokens."""
        used = self.key_bytes_per_token_head + self.value_bytes_per_token_head
        return 1.0 - used / self.thin_bytes_per_token_head

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a request of ``num_tokens`` tokens holds once its prompt has ended.

        Counts a context that is all prompt, or, without eviction, all compacted as it grew.
        """
        spans = self.rule.prompt_spans(num_tokens)
        dense = -(-num_tokens // self.block_size)
        evicted = self.rule.evicted_spans(num_tokens)
        return dense - spans * (self.span_blocks - self.thin_blocks) - evicted * self.thin_blocks

    def effective_multiple(self, num_tokens: int) -> float:
        """Requests of ``num_tokens`` tokens that fit where one dense request fits.

        The recent window and, on average, half a span stay dense.
        """
        dense_tail = min(num_tokens, self.config.kv_recent_window + self.span_tokens / 2)
        old = num_tokens - dense_tail
        if self.config.evicts:
            old = min(old, self.kept_tokens)
        return num_tokens / (old / self.capacity_multiple + dense_tail)
