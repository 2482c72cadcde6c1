"""Write a sorted step in tensors, still on the host."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.attention.cuda_parts import (
    Chunks,
    CutWindows,
    DueSpans,
    EndedPrompts,
    Observed,
    Rows,
    StepParts,
    Tokens,
    WaveParts,
)
from think_vllm.attention.step import Int64Array, Observation, Prefill, PromptEnds, Step, Wave


@dataclass(frozen=True)
class StepSlots:
    """Where the state of a step's requests is kept, by row of the batch.

    Args:
        resumed: Of windows that an earlier step has begun.
        kept: Of windows that a later step goes on with.
        requests: Of channels, for prompts that end and requests with due spans; empty if nothing
            is pruned.
    """

    resumed: dict[int, int] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    requests: dict[int, int] = field(default_factory=dict)


def step_parts(step: Step, slots: StepSlots) -> StepParts:
    """Write a step in tensors, still on the host.

    Args:
        step: Of ``sort_step``.
        slots: Where its requests' state is kept.
    """
    return StepParts(
        prompts=_prompt_parts(step.prefill),
        observed=_observed(step.observations, slots),
        ended=None if step.prompt_ends is None else _ended(step.prompt_ends, slots),
        waves=[_wave_parts(wave, slots) for wave in step.waves],
    )


def due_spans(wave: Wave, slots: StepSlots) -> DueSpans | None:
    """Write a wave's due spans in tensors, still on the host."""
    if not wave.due_request:
        return None
    return DueSpans(
        request=_ints(wave.due_request),
        span=_ints(wave.due_span),
        slot=_ints([slots.requests.get(row, 0) for row in wave.due_request]),
    )


def _prompt_parts(prefill: Prefill | None) -> list[Chunks]:
    """Prompts that start in this step apart from those that go on."""
    if prefill is None:
        return []
    fresh = prefill.seq_len == prefill.num_tokens
    return [
        Chunks(
            fresh=is_fresh,
            tokens=_tokens(chosen.tokens()),
            starts=_ints(np.concatenate(([0], np.cumsum(chosen.num_tokens)))),
            seq_len=_ints(chosen.seq_len),
            request=_ints(chosen.request),
            thin_spans=None,
            max_query_len=int(chosen.num_tokens.max()),
        )
        for is_fresh, which in ((True, fresh), (False, ~fresh))
        if which.any()
        for chosen in [prefill.choose(which)]
    ]


def _observed(observations: list[Observation], slots: StepSlots) -> Observed | None:
    if not observations:
        return None
    requests = [seen.request for seen in observations]
    ended = [i for i, seen in enumerate(observations) if seen.keep_position is None]
    return Observed(
        begin=_ints([seen.begin for seen in observations]),
        end=_ints([seen.end for seen in observations]),
        resumed=_cut_windows(requests, slots.resumed),
        kept=_cut_windows(requests, slots.kept),
        ended=_ints(ended),
    )


def _cut_windows(requests: list[int], slots: dict[int, int]) -> CutWindows | None:
    index = [i for i, row in enumerate(requests) if row in slots]
    if not index:
        return None
    return CutWindows(_ints(index), _ints([slots[requests[i]] for i in index]))


def _ended(ends: PromptEnds, slots: StepSlots) -> EndedPrompts:
    prompt = np.repeat(np.arange(ends.request.size), ends.num_spans)
    return EndedPrompts(
        request=_ints(ends.request),
        prompt_len=_ints(ends.prompt_len),
        slot=_ints([slots.requests.get(int(row), 0) for row in ends.request]),
        max_prompt_len=int(ends.prompt_len.max()),
        span_prompt=_ints(prompt),
        span_request=_ints(ends.request[prompt]),
        span=_ints(np.concatenate([np.arange(count) for count in ends.num_spans])),
    )


def _wave_parts(wave: Wave, slots: StepSlots) -> WaveParts:
    # Rows of one wave come request by request, each in token order.
    _, first, count = np.unique(wave.request, return_index=True, return_counts=True)
    single = first[count == 1]
    single = single[np.argsort(wave.token[single])]
    rows = None
    if single.size:
        rows = Rows(
            tokens=_tokens(wave.token[single]),
            request=_ints(wave.request[single]),
            seq_len=_ints(wave.seq_len[single]),
            thin_spans=_ints(wave.thin_spans[single]),
        )
    return WaveParts(
        due_spans(wave, slots), rows, _resumed_chunks(wave, first[count > 1], count[count > 1])
    )


def _resumed_chunks(wave: Wave, first: Int64Array, count: Int64Array) -> Chunks | None:
    if not first.size:
        return None
    order = np.argsort(wave.token[first])
    first, count = first[order], count[order]
    last = first + count - 1
    return Chunks(
        fresh=False,
        tokens=_tokens(
            np.concatenate([wave.token[i : j + 1] for i, j in zip(first, last, strict=True)])
        ),
        starts=_ints(np.concatenate(([0], np.cumsum(count)))),
        seq_len=_ints(wave.seq_len[last]),
        request=_ints(wave.request[last]),
        thin_spans=_ints(wave.thin_spans[last]),
        max_query_len=int(count.max()),
    )


def _tokens(indices: Int64Array) -> Tokens:
    first, last = int(indices[0]), int(indices[-1])
    # Indices ascend strictly, so the range is full if its ends say so.
    if last - first + 1 == indices.size:
        return slice(first, last + 1)
    return _ints(indices)


def _ints(values: npt.ArrayLike) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.int32))
