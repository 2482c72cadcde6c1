"""A sorted step as layers take it: int32 tensors on their device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from think_vllm.worker.eviction_step import Accumulation, Repack
from think_vllm.worker.tokens import Tokens


@dataclass(frozen=True)
class Chunks:
    """Queries of requests that attend in one call, several per request.

    Args:
        fresh: Whether they see nothing but their own step's keys.
        tokens: Where they are among the step's.
        starts: int32 [n + 1]. Start of each request's among them.
        seq_len: int32 [n]. Tokens that the last one of each request attends to.
        request: int32 [n]. Row of the block table.
        thin_spans: int32 [n]. Spans that each request's see thin; None for none.
        max_query_len: Most queries of a request.
        max_seq_len: Most tokens of ``seq_len``.
        prepared: What the device's builder has prepared of them, once for all layers.
    """

    fresh: bool
    tokens: Tokens
    starts: torch.Tensor
    seq_len: torch.Tensor
    request: torch.Tensor
    thin_spans: torch.Tensor | None
    max_query_len: int
    max_seq_len: int
    prepared: Any = None


@dataclass(frozen=True)
class Slots:
    """Which of several things are kept between steps, and where.

    Args:
        index: int32 [n]. Which of them.
        slot: int32 [n]. Where.
    """

    index: torch.Tensor
    slot: torch.Tensor


@dataclass(frozen=True)
class Observed:
    """Queries in observation windows.

    Args:
        begin: int32 [n]. First of each request's, among the step's tokens.
        end: int32 [n]. One past the last.
        resumed: Windows that an earlier step has begun; None for none.
        kept: Windows that a later step goes on with; None for none.
        ended: int32 [m]. Which of them are complete, in the order of what ends.
    """

    begin: torch.Tensor
    end: torch.Tensor
    resumed: Slots | None
    kept: Slots | None
    ended: torch.Tensor


@dataclass(frozen=True)
class FinishedTensors:
    """Prompts, or chunks of prompts, that end in this step, and the spans compacted then.

    Args:
        request: int32 [m]. Row of the block table, for each selection of channels.
        num_tokens: int32 [m]. Tokens up to the last one whose key counts.
        first_block: int32 [m]. First dense block whose keys count.
        max_tokens: Most tokens whose keys count.
        window: int32 [m]. Which of the windows that end here; None if that is one each, in order.
        kept: Selections that are kept for spans that fall due later; None for none.
        tables: Selections that are kept apart, one for each span of a prompt that the next step
            compacts: where, the first of them, and how many.
        span_selection: int32 [t]. By which selection each span is compacted.
        span_request: int32 [t]. Row of the block table.
        span: int32 [t]. Spans to compact.
        final: int32 [c]. Which selections are for good; others are made once more when what is kept
            of their tokens is repacked. None for all.
        names: Id of each selection's request, where the loss limit asks for it.
    """

    request: torch.Tensor
    num_tokens: torch.Tensor
    first_block: torch.Tensor
    max_tokens: int
    window: torch.Tensor | None
    kept: Slots | None
    tables: list[tuple[int, int, int]]
    span_selection: torch.Tensor
    span_request: torch.Tensor
    span: torch.Tensor
    final: torch.Tensor | None = None
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DueSpans:
    """Spans that have fallen due, perhaps several of a request.

    Args:
        request: int32 [n]. Row of the block table.
        span: int32 [n]. The span.
        slot: int32 [n]. Where the request's channels are kept.
        tables: Spans whose channels are kept apart: the first of a request's, and where.
    """

    request: torch.Tensor
    span: torch.Tensor
    slot: torch.Tensor
    tables: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """Single queries of requests.

    Args:
        tokens: Where they are among the step's.
        request: int32 [R]. Row of the block table.
        seq_len: int32 [R]. Tokens that each attends to, 0 for padding.
        thin_spans: int32 [R]. Spans that each sees thin; None for none.
    """

    tokens: Tokens
    request: torch.Tensor
    seq_len: torch.Tensor
    thin_spans: torch.Tensor | None


@dataclass(frozen=True)
class PassTensors:
    """Queries past their prompts that attend after the same compactions.

    Args:
        due: What is compacted first; None for nothing.
        rows: Those of requests that have one; None for none.
        chunks: Those of resumed requests that have several, those that see thin spans apart.
        repacks: Prompts that are repacked before that.
        repack_slots: Where the channels of each are kept.
    """

    due: DueSpans | None
    rows: Rows | None
    chunks: list[Chunks]
    repacks: list[Repack] = field(default_factory=list)
    repack_slots: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepTensors:
    """A step in the order of ``worker/step.py``.

    Args:
        prompts: Prompt queries.
        observed: Observation windows of prompts.
        finished_prompts: Prompts that end; None for none.
        chunk_observed: Last queries of chunks that end.
        finished_chunks: Chunks that end, of prompts that go on; None for none.
        passes: Queries past their prompts.
        accumulations: Prompt queries that select tokens.
        ended_rows: Row of the batch of each observation window that is complete.
    """

    prompts: list[Chunks]
    observed: Observed | None
    finished_prompts: FinishedTensors | None
    chunk_observed: Observed | None
    finished_chunks: FinishedTensors | None
    passes: list[PassTensors]
    accumulations: list[Accumulation] = field(default_factory=list)
    ended_rows: list[int] = field(default_factory=list)

    def chunks(self) -> list[Chunks]:
        """All of its queries that attend several per request."""
        return [*self.prompts, *itertools.chain(*(decode.chunks for decode in self.passes))]

    def prepare(
        self, prompt: Callable[[Chunks], Any], resumed: Callable[[Chunks], Any]
    ) -> StepTensors:
        """Add what the device prepares once for all layers.

        Args:
            prompt: Prepares queries of prompts.
            resumed: Prepares queries past their prompts.
        """

        def add(chunks: list[Chunks], make: Callable[[Chunks], Any]) -> list[Chunks]:
            return [replace(part, prepared=make(part)) for part in chunks]

        passes = [replace(decode, chunks=add(decode.chunks, resumed)) for decode in self.passes]
        return replace(self, prompts=add(self.prompts, prompt), passes=passes)
