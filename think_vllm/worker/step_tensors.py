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
    """Queries of requests that attend in one call, several per request."""

    fresh: bool  # whether they see nothing but their own step's keys
    tokens: Tokens  # where they are among the step's
    starts: torch.Tensor  # int32 [n + 1]. Start of each request's among them
    seq_len: torch.Tensor  # int32 [n]. Tokens that the last one of each request attends to
    request: torch.Tensor  # int32 [n]. Row of the block table
    thin_spans: torch.Tensor | None  # int32 [n]. Spans that each request's see thin; None for none
    max_query_len: int  # most queries of a request
    max_seq_len: int  # most tokens of ``seq_len``
    prepared: Any = None  # what the device's builder has prepared of them, once for all layers


@dataclass(frozen=True)
class Slots:
    """Which of several things are kept between steps, and where."""

    index: torch.Tensor  # int32 [n]. Which of them
    slot: torch.Tensor  # int32 [n]. Where


@dataclass(frozen=True)
class Observed:
    """Queries in observation windows."""

    begin: torch.Tensor  # int32 [n]. First of each request's, among the step's tokens
    end: torch.Tensor  # int32 [n]. One past the last
    resumed: Slots | None  # windows that an earlier step has begun; None for none
    kept: Slots | None  # windows that a later step goes on with; None for none
    ended: torch.Tensor  # int32 [m]. Which of them are complete, in the order of what ends


@dataclass(frozen=True)
class KeyRanges:
    """Keys in dense blocks, of several requests."""

    request: torch.Tensor  # int32 [m]. Row of the block table
    num_tokens: torch.Tensor  # int32 [m]. Tokens up to the last one that counts
    first_block: torch.Tensor  # int32 [m]. First block that counts
    max_tokens: int  # most tokens that count


@dataclass(frozen=True)
class FinishedTensors:
    """Prompts, or chunks of prompts, that end in this step, and the spans compacted then."""

    keys: KeyRanges  # those that count, for each selection of channels
    #: int32 [m]. Which of the windows that end here; None if that is one each, in order.
    window: torch.Tensor | None
    kept: Slots | None  # selections that are kept for spans that fall due later; None for none
    #: Selections that are kept apart, one for each span of a prompt that the next step compacts:
    #: where, the first of them, and how many.
    tables: list[tuple[int, int, int]]
    span_selection: torch.Tensor  # int32 [t]. By which selection each span is compacted
    span_request: torch.Tensor  # int32 [t]. Row of the block table
    span: torch.Tensor  # int32 [t]. Spans to compact
    #: int32 [c]. Which selections are for good; others are made once more when what is kept of
    #: their tokens is repacked. None for all.
    final: torch.Tensor | None = None
    #: Id of each selection's request, where the loss limit asks for it.
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DueSpans:
    """Spans that have fallen due, perhaps several of a request."""

    request: torch.Tensor  # int32 [n]. Row of the block table
    span: torch.Tensor  # int32 [n]. The span
    slot: torch.Tensor  # int32 [n]. Where the request's channels are kept
    #: Spans whose channels are kept apart: the first of a request's, and where.
    tables: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Rows:
    """Single queries of requests."""

    tokens: Tokens  # where they are among the step's
    request: torch.Tensor  # int32 [R]. Row of the block table
    seq_len: torch.Tensor  # int32 [R]. Tokens that each attends to, 0 for padding
    thin_spans: torch.Tensor | None  # int32 [R]. Spans that each sees thin; None for none


@dataclass(frozen=True)
class PassTensors:
    """Queries past their prompts that attend after the same compactions."""

    due: DueSpans | None  # what is compacted first; None for nothing
    rows: Rows | None  # those of requests that have one; None for none
    #: Those of resumed requests that have several, those that see thin spans apart.
    chunks: list[Chunks]
    repacks: list[Repack] = field(default_factory=list)  # prompts that are repacked before that
    repack_slots: list[int] = field(default_factory=list)  # where the channels of each are kept


@dataclass(frozen=True)
class StepTensors:
    """A step in the order of ``worker/step.py``."""

    prompts: list[Chunks]  # prompt queries
    observed: Observed | None  # observation windows of prompts
    finished_prompts: FinishedTensors | None  # prompts that end; None for none
    chunk_observed: Observed | None  # last queries of chunks that end
    finished_chunks: FinishedTensors | None  # chunks that end, of prompts that go on; None for none
    passes: list[PassTensors]  # queries past their prompts
    #: Prompt queries that select tokens.
    accumulations: list[Accumulation] = field(default_factory=list)
    #: Row of the batch of each observation window that is complete.
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
