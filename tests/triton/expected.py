"""Requests, and what attention should answer them: float64, in plain torch, one token at a time."""

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.triton.reference import (
    compact_spans_ref,
    dense_tokens,
    gather_context,
    gather_tokens_ref,
    key_energy_ref,
    split_dense,
)
from think_vllm.kernels.reference.eviction import attention_sums_ref, pool_ref, select_tokens_ref
from think_vllm.kernels.reference.scoring import key_scores_ref, query_energy_ref, top_channels_ref
from think_vllm.plan.planner import BlockPlan
from think_vllm.plan.request import request_override
from think_vllm.plan.spans import SpanRule

SCALE = 0.2


@dataclass
class Request:
    """What a request would feed each layer, ``[layers, total, heads, D]``, and where it stands.

    ``blocks`` is the worker's row, only ever appended to; ``gone`` are rows whose block it does not
    hold, or never did; ``admitted`` says whether no step has run since it was admitted.
    """

    name: str
    prompt_len: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    computed: int = 0
    prefill_len: int = 0
    cached_spans: int = 0
    freed_spans: int = 0
    admitted: bool = True
    extra_args: dict[str, Any] | None = None
    blocks: list[int] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)

    @property
    def total(self) -> int:
        return self.query.shape[1]

    def rule(self, plan: BlockPlan) -> SpanRule:
        """When its spans are thin."""
        return request_override(plan.rule, self.extra_args) or plan.rule


@dataclass
class Expected:
    """An undisturbed request's life.

    ``output``, [layers, total, Hq, D] float64, is of tokens that it computed; ``channels`` are per
    layer and span those that the span keeps, [1, Hk, K].
    """

    output: torch.Tensor
    channels: list[list[torch.Tensor]]


def make_request(
    name: str, prompt_len: int, total: int, heads: tuple[int, int], plan: BlockPlan, layers: int = 1
) -> Request:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + total)

    def some(count: int) -> torch.Tensor:
        return torch.randn(layers, total, count, plan.head_size, generator=generator)

    query, key, value = some(heads[0]), some(heads[1]), some(heads[1])
    return Request(name, prompt_len, query, key, value, prefill_len=prompt_len)


def expect(
    request: Request,
    plan: BlockPlan,
    start: int = 0,
    cached: Sequence[Sequence[torch.Tensor]] | None = None,
    borders: Sequence[int] = (),
) -> Expected:
    """Follow a request.

    The prefix cache had ``start`` tokens, and per layer ``cached`` has the channels of the spans
    among them that came thin. For ``borders`` see ``Life.add``.
    """
    lives = [
        _Life(*tensors, request.prompt_len, plan, layer, request.rule(plan)).run(
            start, had, borders
        )
        for layer, (*tensors, had) in enumerate(
            zip(
                request.query,
                request.key,
                request.value,
                [()] * len(request.key) if cached is None else cached,
                strict=True,
            )
        )
    ]
    return Expected(torch.stack([out for out, _ in lives]), [channels for _, channels in lives])


class _Life:
    """A request in one layer, which alone has a cache."""

    def __init__(self, query, key, value, prompt_len, plan, layer, rule):
        self.layer, self.rule = layer, rule
        self.query, self.plan, self.prompt_len = query, plan, prompt_len
        self.kv_cache = _dense_cache(key, value, plan)
        self.table = torch.arange(len(self.kv_cache), dtype=torch.int32)[None]
        self.channels: list[torch.Tensor] = []
        self.out = torch.zeros(query.shape, dtype=torch.float64)
        self.context_state, self.context = None, []
        self.evicted = 0

    def run(self, start, cached, borders):
        rule, length = self.rule, self.prompt_len
        for channels in cached:
            self._compact(len(self.channels) + 1, channels)
        for begin, end in itertools.pairwise([start, *borders, length]):
            self._attend(begin, end)
            window = min(self.plan.config.kv_observation_window, end - begin)
            if end == length:
                window = min(self.plan.config.kv_observation_window, length)
            if end == length and rule.evicted_spans(length):
                self._repack()
            last = rule.thin_spans(length, end, end, len(cached))
            chosen = self._select(end, window)
            while self.plan.config.kv_channel_tables == "span" and len(self.channels) < last:
                chosen = self._select((len(self.channels) + 1) * rule.span_tokens, window, end)
                self._compact(len(self.channels) + 1, chosen)
            self._compact(last, chosen)
        # A span takes the channels of the one before it, if this prompt has made that.
        heirs = self.channels[-1] if len(self.channels) > len(cached) else chosen
        for position in range(length, len(self.query)):
            self._compact(rule.thin_spans(length, position, cached=len(cached)), heirs)
            self._attend(position, position + 1)
        return self.out, self.channels

    def _select(self, end, window, seen=None):
        """Choose over the dense keys up to ``end``, by the last of ``seen`` queries."""
        first = max(self.evicted, len(self.channels)) * self.plan.span_blocks
        seen = end if seen is None else seen
        observed = slice(seen - window, seen)
        scores = key_scores_ref(
            self.plan.config.kv_select,
            query_energy_ref(self.query[observed], self.kv_cache.shape[1])[None],
            key_energy_ref(self.kv_cache, self.table, [0], [end], self.plan, [first]),
            self.layer,
        )
        channels = top_channels_ref(scores, self.plan.key_channels)
        if self.plan.prunes_values:
            assert self.plan.config.kv_select != "random"
            score = query_energy_ref(self.out[observed], self.kv_cache.shape[1])[None]
            values = top_channels_ref(score, self.plan.value_channels)
            channels = torch.cat([channels, values], dim=2)
        return channels

    def _repack(self):
        """Put each head's tokens, still dense, in the place of the prompt's last old ones."""
        rule, length, config = self.rule, self.prompt_len, self.plan.config
        self.evicted, spans = rule.evicted_spans(length), rule.prompt_spans(length)
        old, kept = spans * rule.span_tokens, rule.budget_spans * rule.span_tokens
        keys, _ = dense_tokens(self.kv_cache, range(len(self.kv_cache)), length)
        first = max(0, length - config.kv_observation_window) if config.kv_evict == "snapkv" else 0
        scores = attention_sums_ref(self.query[first:length], keys, first, SCALE)
        if config.kv_evict == "snapkv":
            scores = pool_ref(scores, max(old, first))
        tokens = select_tokens_ref(scores[:, :old], kept)
        blocks = list(range(spans * rule.span_blocks))
        packed = gather_tokens_ref(self.kv_cache, blocks, tokens, self.plan)
        self.kv_cache[self.evicted * rule.span_blocks : len(blocks)] = packed
        self.kv_cache[: self.evicted * rule.span_blocks] = 0

    def _compact(self, count, channels):
        for span in range(len(self.channels), count):
            if span >= self.evicted and self.plan.rule.shrinks:
                compact_spans_ref(self.kv_cache, self.table, [0], [span], channels, self.plan)
            self.channels.append(channels)

    def _attend(self, begin, end):
        # What is only evicted stays dense.
        total, thin = len(self.query), len(self.channels) if self.plan.rule.shrinks else 0
        state = thin, self.evicted
        if state != self.context_state:
            self.context_state, group = state, self.query.shape[1] // self.kv_cache.shape[1]
            # Later tokens are in there too, masked below.
            context = gather_context(self.kv_cache, self.table, 0, total, thin, self.plan)
            self.context = [x.repeat_interleave(group, 0) for x in context]
        keys, values = self.context
        scores = torch.einsum("qhd,hkd->qhk", self.query[begin:end].double(), keys) * SCALE
        later = torch.arange(total) > torch.arange(begin, end)[:, None]
        later |= torch.arange(total) < self.evicted * self.plan.span_tokens
        scores.masked_fill_(later[:, None], -torch.inf)
        self.out[begin:end] = torch.einsum("qhk,hkd->qhd", scores.softmax(2), values)


def _dense_cache(key, value, plan):
    total, num_kv_heads, head_size = key.shape
    count = -(-total // plan.block_size)
    kv_cache = torch.zeros(count, num_kv_heads, plan.block_size, 2 * head_size)
    for part, tensor in zip(split_dense(kv_cache), (key, value), strict=True):
        padded = torch.zeros(count * plan.block_size, num_kv_heads, head_size)
        padded[:total] = tensor
        part.copy_(padded.unflatten(0, (count, plan.block_size)).transpose(1, 2))
    assert torch.equal(dense_tokens(kv_cache, range(count), total)[0], key.transpose(0, 1))
    return kv_cache
