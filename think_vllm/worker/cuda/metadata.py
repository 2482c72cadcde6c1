"""A sorted step in the form that kernels on a GPU take: int32 tensors there, sent in one go."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from think_vllm.worker.eviction_step import Pack, Watched
from think_vllm.worker.tokens import Tokens

#: Tokens of a tile of FlashAttention, at most: entries behind a context that it may look at.
_FLASH_TILE = 256

T = TypeVar("T")

#: Triton compiles kernels for pointers to multiples of 16 bytes apart from those for others.
_ALIGN = 4


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
        pages: int32 [n, width]. Blocks of each request, for those that see earlier steps' keys and
            no thin spans; None for others, and until ``with_pages`` adds them.
    """

    fresh: bool
    tokens: Tokens
    starts: torch.Tensor
    seq_len: torch.Tensor
    request: torch.Tensor
    thin_spans: torch.Tensor | None
    max_query_len: int
    max_seq_len: int
    pages: torch.Tensor | None = None


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
class EndedParts:
    """Prompts, or chunks of prompts, that end in this step, and the spans compacted then.

    Args:
        request: int32 [m]. Row of the block table, for each choice of channels.
        num_tokens: int32 [m]. Tokens up to the last one whose key counts.
        first_block: int32 [m]. First dense block whose keys count.
        max_tokens: Most tokens whose keys count.
        window: int32 [m]. Which of the windows that end here; None if that is one each, in order.
        kept: Choices that are kept for spans that fall due later; None for none.
        tables: Choices that are kept apart, one for each span of a prompt that the next step
            compacts: where, the first of them, and how many.
        span_choice: int32 [t]. By which choice each span is compacted.
        span_request: int32 [t]. Row of the block table.
        span: int32 [t]. Spans to compact.
        final: int32 [c]. Which choices are for good; others are made once more when what is kept
            of their tokens is packed. None for all.
    """

    request: torch.Tensor
    num_tokens: torch.Tensor
    first_block: torch.Tensor
    max_tokens: int
    window: torch.Tensor | None
    kept: Slots | None
    tables: list[tuple[int, int, int]]
    span_choice: torch.Tensor
    span_request: torch.Tensor
    span: torch.Tensor
    final: torch.Tensor | None = None


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
    """Single queries of requests, past their prompts.

    Args:
        tokens: Where they are among the step's.
        request: int32 [R]. Row of the block table.
        seq_len: int32 [R]. Tokens that each attends to, 0 for padding.
        thin_spans: int32 [R]. Spans that each sees thin.
    """

    tokens: Tokens
    request: torch.Tensor
    seq_len: torch.Tensor
    thin_spans: torch.Tensor


@dataclass(frozen=True)
class WaveParts:
    """Queries past their prompts that attend after the same compactions.

    Args:
        due: What is compacted first; None for nothing.
        rows: Those of requests that have one; None for none.
        chunks: Those of resumed requests that have several, those that see thin spans apart.
        packs: Prompts that are packed before that.
        pack_slots: Where the channels of each are kept.
    """

    due: DueSpans | None
    rows: Rows | None
    chunks: list[Chunks]
    packs: list[Pack] = field(default_factory=list)
    pack_slots: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StepParts:
    """A step in the order of ``worker/step.py``.

    Args:
        prompts: Prompt queries.
        observed: Observation windows of prompts.
        prompt_ends: Prompts that end; None for none.
        chunk_observed: Last queries of chunks that end.
        chunk_ends: Chunks that end, of prompts that go on; None for none.
        waves: Queries past their prompts.
        watched: Prompt queries that choose tokens.
        ended_rows: Row of the batch of each observation window that is complete.
    """

    prompts: list[Chunks]
    observed: Observed | None
    prompt_ends: EndedParts | None
    chunk_observed: Observed | None
    chunk_ends: EndedParts | None
    waves: list[WaveParts]
    watched: list[Watched] = field(default_factory=list)
    ended_rows: list[int] = field(default_factory=list)

    @property
    def reads_pages(self) -> bool:
        """Whether FlashAttention can read blocks of the cache for some of its queries."""
        chunks = itertools.chain(self.prompts, *(wave.chunks for wave in self.waves))
        return any(part.pages is not None for part in chunks)


def with_pages(
    parts: StepParts, block_table: torch.Tensor, wave_table: torch.Tensor, block_size: int
) -> StepParts:
    """Add the blocks of chunks that FlashAttention can read, once for all layers.

    Args:
        parts: On the device.
        block_table: int32 [num_reqs, width]. Of prompt queries.
        wave_table: int32 [rows, width]. Of queries past their prompts: the same, or
            ``table_of_entries`` of it.
        block_size: Tokens of a block.
    """

    def add(chunks: list[Chunks], table: torch.Tensor) -> list[Chunks]:
        return [
            part
            if part.fresh or part.thin_spans is not None
            else replace(part, pages=_rows(table, part.request, part.max_seq_len, block_size))
            for part in chunks
        ]

    waves = [replace(wave, chunks=add(wave.chunks, wave_table)) for wave in parts.waves]
    return replace(parts, prompts=add(parts.prompts, block_table), waves=waves)


def _rows(
    table: torch.Tensor, request: torch.Tensor, max_tokens: int, block_size: int
) -> torch.Tensor:
    """Entries of a block table from the start of each request's row on, a copy.

    Enough for ``max_tokens`` tokens, and a tile more where the table has them.
    """
    needed = -(-max_tokens // block_size)
    width = needed + -(-_FLASH_TILE // block_size)
    if needed <= table.shape[1]:
        return table[:, :width].index_select(0, request)
    # A row begins at every entry. Nobody reads what is behind a request's own entries.
    entries = request[:, None] + torch.arange(width, dtype=torch.int32, device=table.device)
    return table.flatten()[entries.clamp_(max=table.shape[0] - 1)]


def to_device(parts: T, device: torch.device) -> T:
    """Send all tensors of nested dataclasses in one copy that nobody waits for."""
    found = list(_tensors(parts))
    if not found:
        return parts
    sizes = [tensor.numel() for tensor in found]
    starts = np.cumsum([0] + [-(-size // _ALIGN) * _ALIGN for size in sizes])
    packed = torch.zeros(int(starts[-1]), dtype=torch.int32)
    for tensor, start, size in zip(found, starts, sizes, strict=False):
        packed[start : start + size] = tensor
    sent = async_tensor_h2d(packed, device=device)
    views = (sent[start : start + size] for start, size in zip(starts, sizes, strict=False))
    made: T = _replaced(parts, views)
    return made


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _tensors(item)
    elif is_dataclass(part):
        for member in fields(part):
            yield from _tensors(getattr(part, member.name))


def _replaced(part: Any, views: Iterator[torch.Tensor]) -> Any:
    if isinstance(part, torch.Tensor):
        return next(views)
    if isinstance(part, list):
        return [_replaced(item, views) for item in part]
    if is_dataclass(part) and not isinstance(part, type):
        names = [member.name for member in fields(part)]
        return type(part)(**{name: _replaced(getattr(part, name), views) for name in names})
    return part
