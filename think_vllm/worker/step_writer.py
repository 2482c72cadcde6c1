"""Write a sorted step in tensors, still on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step import (
    DecodePass,
    Finished,
    Int64Array,
    Observation,
    Prefill,
    Selections,
    Step,
)
from think_vllm.worker.step_tensors import (
    Chunks,
    DueSpans,
    FinishedTensors,
    KeyRanges,
    Observed,
    PassTensors,
    Rows,
    Slots,
    StepTensors,
)
from think_vllm.worker.tokens import token_range

Q = TypeVar("Q", Rows, Chunks)


@dataclass(frozen=True)
class StepSlots:
    """Where the state of a step's requests is kept, by row of the batch."""

    #: Of windows that an earlier step has begun.
    resumed: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)  # of windows that a later step goes on with
    #: Of channels, for ends that keep some and requests with due spans; empty if nothing is pruned.
    requests: dict[int, int] = field(default_factory=dict)
    #: Rows with due spans whose channels are kept apart.
    tables: set[int] = field(default_factory=set)


def write_step(
    step: Step,
    slots: StepSlots,
    rule: SpanRule,
    selects_per_span: bool = False,
    evicted: Int64Array | None = None,
    names: Sequence[str] | None = None,
) -> StepTensors:
    """Write a step in tensors, still on the host.

    Args:
        step: Of ``sort_step``.
        slots: Where its requests' state is kept.
        rule: What a span is.
        selects_per_span: Whether each span of a prompt has channels of its own.
        evicted: int64 [num_reqs]. Empty spans of each request, which count as thin; None for none.
        names: [num_reqs]. Ids of the requests, where the loss limit asks for those of prompts that
            end.
    """
    chunks, chunk_windows = step.finished_chunks, []
    if chunks is not None and chunks.num_observed.any():
        chunk_windows = chunks.observations
    return StepTensors(
        prompts=_prompt_chunks(step.prefill),
        observed=_observed(step.observations, slots),
        finished_prompts=_ended(step.finished_prompts, slots, rule, selects_per_span, names),
        # These windows begin and end here, whatever is kept of their prompts' windows.
        chunk_observed=_observed(chunk_windows, StepSlots()),
        finished_chunks=_ended(chunks, slots, rule, selects_per_span),
        passes=[_pass_tensors(decode, slots, evicted) for decode in step.passes],
    )


def keeps_channels(ends: Finished) -> npt.NDArray[np.bool_]:
    """Whose channels are kept: bool [n].

    A span that falls due later takes them from there, also where it inherits them from the span
    before: that span's were kept last.
    """
    kept: npt.NDArray[np.bool_] = ends.keeps | (ends.num_spans > 0)
    return kept


def due_spans(decode: DecodePass, slots: StepSlots) -> DueSpans | None:
    """Write a pass's due spans in tensors, still on the host."""
    if not decode.due_request:
        return None
    rows, kept = decode.due_request, decode.due_kept
    return DueSpans(
        request=_ints(rows),
        span=_ints(decode.due_span),
        slot=_ints([slots.requests.get(row, 0) for row in rows]),
        # Spans of a request are neighbours, and if one of these has a table, all of them do.
        tables=[
            (i, slots.requests[row])
            for i, row in enumerate(rows)
            if row in slots.tables and kept[i] and (i == 0 or rows[i - 1] != row)
        ],
    )


def _less(thin_spans: torch.Tensor | None, empty: torch.Tensor) -> torch.Tensor | None:
    """Thin spans that are not empty; None for queries that see none."""
    return None if thin_spans is None else thin_spans - empty


def skip_evicted(
    rule: SpanRule, decode: PassTensors, evicted: Int64Array, row_entries: int
) -> PassTensors:
    """Let queries past their prompts begin behind the empty spans, still on the host.

    Args:
        rule: What a span is.
        decode: The pass, with rows of the block table.
        evicted: int64 [num_reqs]. Empty spans of each request.
        row_entries: Entries from one row of the block table to the next.

    Returns:
        The same queries over ``table_of_entries``, as if the empty spans had never been.
    """

    def skip(queries: Q) -> Q:
        empty = torch.from_numpy(evicted[queries.request.numpy()]).int()
        return replace(
            queries,
            request=queries.request * row_entries + empty * rule.span_blocks,
            seq_len=queries.seq_len - empty * rule.span_tokens,
            thin_spans=_less(queries.thin_spans, empty),
        )

    return replace(
        decode,
        rows=None if decode.rows is None else skip(decode.rows),
        chunks=[skip(chunks) for chunks in decode.chunks],
    )


def keep_dense(passes: list[DecodePass], evicted: Int64Array) -> None:
    """Let spans stay dense that would take as many blocks once they are thin.

    Thin blocks that nothing was pruned or quantized of would hold the same elements in another
    form, which FlashAttention cannot read.

    Args:
        passes: Without repacks. Changed: nothing is due, and only empty spans count as thin.
        evicted: int64 [num_reqs]. Empty spans of each request.
    """
    for decode in passes:
        decode.due_request, decode.due_span, decode.due_kept = [], [], []
        decode.thin_spans = np.minimum(decode.thin_spans, evicted[decode.request])


def _prompt_chunks(prefill: Prefill | None) -> list[Chunks]:
    """Prompts that start in this step, those that go on, and those that see thin spans."""
    if prefill is None:
        return []
    fresh = prefill.seq_len == prefill.num_tokens
    thin = prefill.thin_spans > 0
    return [
        write_chunks(prefill.select(which), is_fresh)
        for is_fresh, which in ((True, fresh), (False, ~fresh & ~thin), (False, thin))
        if which.any()
    ]


def write_chunks(prefill: Prefill, fresh: bool) -> Chunks:
    """Write prompt queries in tensors.

    Args:
        prefill: All of which see thin spans, or none.
        fresh: Whether they see nothing but their own step's keys.
    """
    return Chunks(
        fresh=fresh,
        tokens=token_range(prefill.tokens(), torch.int32),
        starts=_ints(np.concatenate(([0], np.cumsum(prefill.num_tokens)))),
        seq_len=_ints(prefill.seq_len),
        request=_ints(prefill.request),
        thin_spans=_ints(prefill.thin_spans) if prefill.thin_spans.any() else None,
        max_query_len=int(prefill.num_tokens.max()),
        max_seq_len=int(prefill.seq_len.max()),
    )


def _observed(observations: list[Observation], slots: StepSlots) -> Observed | None:
    if not observations:
        return None
    requests = [seen.request for seen in observations]
    ended = [i for i, seen in enumerate(observations) if seen.keep_position is None]
    return Observed(
        begin=_ints([seen.begin for seen in observations]),
        end=_ints([seen.end for seen in observations]),
        resumed=_cut(requests, slots.resumed),
        kept=_cut(requests, slots.kept),
        ended=_ints(ended),
    )


def _cut(requests: list[int], slots: dict[int, int]) -> Slots | None:
    index = [i for i, row in enumerate(requests) if row in slots]
    if not index:
        return None
    return Slots(_ints(index), _ints([slots[requests[i]] for i in index]))


def _ended(
    ends: Finished | None,
    slots: StepSlots,
    rule: SpanRule,
    selects_per_span: bool,
    names: Sequence[str] | None = None,
) -> FinishedTensors | None:
    """Write ends in tensors; None if there is nothing to keep and nothing to compact."""
    if ends is None:
        return None
    index = np.flatnonzero(keeps_channels(ends))
    if not index.size:
        return None
    which, span = ends.spans()
    selections = ends.selections(rule, selects_per_span)
    kept, tables = None, []
    if slots.requests:
        given = [slots.requests[int(i)] for i in ends.request[index]]
        kept = Slots(_ints((selections.begin + selections.count - 1)[index]), _ints(given))
        if selects_per_span and rule.delay_prompt:
            parts = zip(given, selections.begin[index], selections.count[index], strict=True)
            tables = [(slot, int(begin), int(count)) for slot, begin, count in parts]
    return FinishedTensors(
        keys=KeyRanges(
            _ints(ends.request[selections.end]),
            _ints(selections.num_tokens),
            _ints(selections.first_block),
            int((selections.num_tokens - selections.first_block * rule.block_size).max()),
        ),
        window=_ints(selections.end) if selects_per_span else None,
        kept=kept,
        tables=tables,
        span_selection=_ints(selections.of_span),
        span_request=_ints(ends.request[which]),
        span=_ints(span),
        final=_final(ends, selections),
        names=[] if names is None else [names[row] for row in ends.request[selections.end]],
    )


def _final(ends: Finished, selections: Selections) -> torch.Tensor | None:
    repacked = ends.repacked[selections.end]
    return _ints(np.flatnonzero(~repacked)) if repacked.any() else None


def _pass_tensors(decode: DecodePass, slots: StepSlots, evicted: Int64Array | None) -> PassTensors:
    # Rows of one pass come request by request, each in token order.
    _, first, count = np.unique(decode.request, return_index=True, return_counts=True)
    single = first[count == 1]
    single = single[np.argsort(decode.token[single])]
    rows = None
    if single.size:
        rows = Rows(
            tokens=token_range(decode.token[single], torch.int32),
            request=_ints(decode.request[single]),
            seq_len=_ints(decode.seq_len[single]),
            thin_spans=_ints(decode.thin_spans[single]),
        )
    first, count = first[count > 1], count[count > 1]
    thin = decode.thin_spans[first]
    if evicted is not None:
        thin = thin - evicted[decode.request[first]]
    return PassTensors(
        due_spans(decode, slots),
        rows,
        [
            _resumed_chunks(decode, first[which], count[which], sees_thin)
            for sees_thin, which in ((False, thin == 0), (True, thin > 0))
            if which.any()
        ],
    )


def _resumed_chunks(
    decode: DecodePass, first: Int64Array, count: Int64Array, sees_thin: bool
) -> Chunks:
    order = np.argsort(decode.token[first])
    first, count = first[order], count[order]
    last = first + count - 1
    return Chunks(
        fresh=False,
        tokens=token_range(
            np.concatenate([decode.token[i : j + 1] for i, j in zip(first, last, strict=True)]),
            torch.int32,
        ),
        starts=_ints(np.concatenate(([0], np.cumsum(count)))),
        seq_len=_ints(decode.seq_len[last]),
        request=_ints(decode.request[last]),
        thin_spans=_ints(decode.thin_spans[last]) if sees_thin else None,
        max_query_len=int(count.max()),
        max_seq_len=int(decode.seq_len[last].max()),
    )


def _ints(values: npt.ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int32))
