"""A model of what the worker does to blocks: every block holds a note of what was written to it.

It checks what the worker would read. A block freed too early, handed out twice, shared while
somebody writes it or found under a wrong key makes a note wrong.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step_sorter import leading_thin_spans

BLOCK = 4
#: 3 blocks become 2; 5 recent tokens stay dense.
RULE = SpanRule(block_size=BLOCK, span_blocks=3, thin_blocks=2, recent_window=5, prune_decode=True)


def make_spec(**changes: Any) -> ThinKVCacheSpec:
    """A spec of ``RULE``; of ``changes``, those that the rule has are made there."""
    of_rule = {f.name for f in fields(SpanRule)} & changes.keys()
    rule = replace(RULE, **{name: changes.pop(name) for name in of_rule})
    shape = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    return ThinKVCacheSpec(**shape, rule=rule, **changes)


@dataclass(frozen=True)
class Dense:
    """A dense block: the tokens before it, its own, and whether they were computed exactly."""

    before: tuple[int, ...]
    tokens: tuple[int, ...]
    exact: bool


@dataclass(frozen=True)
class Thin:
    """A thin block: the tokens up to its span's end, who made it, and which one it is."""

    tokens: tuple[int, ...]
    version: str
    number: int


@dataclass
class Row:
    """What the worker knows of a request: its blocks, and what it has done to them."""

    tokens: list[int]
    blocks: list[int]
    thin: int
    exact: bool
    hit: int
    rule: SpanRule
    prompt_len: int = 0


@dataclass
class Worker:
    """Contents of every block, and each request's row."""

    rule: SpanRule
    memory: dict[int, Dense | Thin] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)

    def start(
        self, name: str, tokens: list[int], blocks: list[int], computed: int, own: SpanRule | None
    ) -> None:
        table = np.array([blocks + [0] * 60], np.int32)
        thin = int(leading_thin_spans(self.rule, table, np.array([computed]))[0])
        rule = own or self.rule
        assert not (thin and rule.stays_dense)
        self.rows[name] = Row(tokens, blocks, thin, exact=thin == 0, hit=computed, rule=rule)

    def copy(self, copies: list[tuple[int, int]]) -> None:
        # All sources are read before the first copy is written.
        found = [self.memory[source] for source, _ in copies]
        self.memory.update(zip([target for _, target in copies], found, strict=True))

    def run(self, name: str, prompt_len: int, start: int, count: int) -> None:
        """One chunk: store, then for each query compact what is due and read."""
        row, rule = self.rows[name], self.rows[name].rule
        row.prompt_len = prompt_len
        cached = self._cached(row, start)
        for position in range(start, start + count):
            index, offset = divmod(position, BLOCK)
            held = self.memory.get(row.blocks[index])
            before = tuple(row.tokens[: index * BLOCK])
            kept = tuple(row.tokens[index * BLOCK : position])
            if offset:  # a block's first token claims it; later ones must find it still theirs
                assert isinstance(held, Dense), (held, position)
                assert (held.before, held.tokens[:offset]) == (before, kept)
            exact = rule.thin_spans(prompt_len, position, start, cached) == 0
            if offset:
                exact &= held.exact
            self.memory[row.blocks[index]] = Dense(before, (*kept, row.tokens[position]), exact)
        for position in range(start, start + count):
            if position >= prompt_len:
                self._compact(row, name, rule.thin_spans(prompt_len, position, 0, cached))
            seen = rule.thin_spans(prompt_len, position, start, cached)
            assert seen == row.thin
            self._read(row, position)
            if position == prompt_len - 1 and not rule.delay_prompt:
                self._compact(row, name, max(cached, rule.prompt_spans(prompt_len)))
        end = start + count
        if rule.prune_prefill and end < prompt_len:
            self._compact(row, name, max(cached, rule.prompt_spans(end)))

    def _cached(self, row: Row, computed: int) -> int:
        table = np.array([row.blocks + [0] * 60], np.int32)
        return int(leading_thin_spans(self.rule, table, np.array([computed]))[0])

    def _compact(self, row: Row, name: str, target: int) -> None:
        rule = row.rule
        evicted, prompt_spans = self._packed(row)
        if evicted and row.thin < prompt_spans <= target:
            # All old tokens are read before the first is written.
            for index in range(prompt_spans * rule.span_blocks):
                self._check_dense(row, index, (index + 1) * BLOCK)
            for span in range(evicted, prompt_spans):
                self._write_thin(row, name, span, prompt_spans)
            row.thin = prompt_spans
        for span in range(row.thin, target):
            row.thin = span + 1
            if rule.shrinks:
                first = span * rule.span_blocks
                for index in range(first, first + rule.span_blocks):
                    self._check_dense(row, index, (index + 1) * BLOCK)
                self._write_thin(row, name, span, span + 1)

    def _write_thin(self, row: Row, name: str, span: int, num_spans: int) -> None:
        """Write a span that holds tokens of the first ``num_spans`` spans."""
        rule = self.rule
        tokens = tuple(row.tokens[: num_spans * rule.span_tokens])
        for j in range(rule.thin_blocks):
            self.memory[row.blocks[span * rule.span_blocks + j]] = Thin(tokens, name, j)

    def _packed(self, row: Row) -> tuple[int, int]:
        """Empty spans of a request past its prompt, and the spans that are packed then."""
        return row.rule.evicted_spans(row.prompt_len), row.rule.prompt_spans(row.prompt_len)

    def _read(self, row: Row, position: int) -> None:
        rule = row.rule
        evicted, prompt_spans = self._packed(row) if row.thin else (0, 0)
        dense_from = row.thin if rule.shrinks or evicted else 0
        for span in range(evicted, dense_from):
            first = span * rule.span_blocks
            held = [self.memory[row.blocks[first + j]] for j in range(rule.thin_blocks)]
            end = max(span + 1, prompt_spans if evicted else 0)
            tokens = tuple(row.tokens[: end * rule.span_tokens])
            for j, content in enumerate(held):
                assert isinstance(content, Thin), content
                assert (content.tokens, content.number) == (tokens, j)
            # Blocks of two versions are two choices of channels.
            assert len({content.version for content in held}) == 1
        for index in range(dense_from * rule.span_blocks, position // BLOCK + 1):
            self._check_dense(row, index, min(position + 1, (index + 1) * BLOCK))

    def _check_dense(self, row: Row, index: int, end: int) -> None:
        held = self.memory[row.blocks[index]]
        assert isinstance(held, Dense), held
        tokens = tuple(row.tokens[index * BLOCK : end])
        assert (held.before, held.tokens[: len(tokens)]) == (
            tuple(row.tokens[: index * BLOCK]),
            tokens,
        )
        # Its own later tokens may be approximate, but not what it hit.
        if row.exact and (index + 1) * BLOCK <= row.hit:
            assert held.exact
