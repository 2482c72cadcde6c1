"""Sort one step's batch into what has to happen to it, and in which order.

Numpy only, knows neither vLLM nor the device. In every layer, after the new keys and values
have been stored densely, a forward pass runs

1. ``prefill``: prompt queries attend to dense blocks;
2. ``observations``: queries of the observation window are added to their request's energy;
3. ``prompt_ends``: prompts that end here choose their channels and are compacted;
4. ``waves``: queries past the prompt attend to thin and dense blocks, each wave after the
   spans that became due for it have been compacted.

A step has one wave, except when a preempted request recomputes generated tokens: a chunk
that crosses the end of its prompt, or several due positions, needs one wave per position at
which a span becomes thin. So every query sees exactly the blocks that it saw the first time.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from think_vllm.spans import SpanRule

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prefill:
    """Prompt queries of a step.

    Args:
        request: int64 [n]. Row of the batch.
        first_token: int64 [n]. The request's first query, as an index into the step's tokens.
        num_tokens: int64 [n]. How many of its queries are prompt queries.
        seq_len: int64 [n]. Tokens that the last of them attends to, itself included.
    """

    request: Int64Array
    first_token: Int64Array
    num_tokens: Int64Array
    seq_len: Int64Array

    def choose(self, which: npt.NDArray[np.bool_]) -> "Prefill":
        """The chosen requests alone."""
        return Prefill(
            self.request[which],
            self.first_token[which],
            self.num_tokens[which],
            self.seq_len[which],
        )

    def tokens(self) -> Int64Array:
        """All queries, as indices into the step's tokens: int64 [num_tokens.sum()]."""
        ends = np.cumsum(self.num_tokens)
        offset = np.repeat(self.first_token - (ends - self.num_tokens), self.num_tokens)
        indices: Int64Array = np.arange(int(ends[-1])) + offset
        return indices


@dataclass(frozen=True)
class Observation:
    """Queries of one request that lie in its observation window.

    Args:
        request: Row of the batch.
        begin: First of them, as an index into the step's tokens.
        end: One past the last.
        resume_position: Position whose block keeps the energy of the window's earlier
            queries, None if there are none.
        keep_position: Position whose block shall keep the energy, None at the prompt's end.
    """

    request: int
    begin: int
    end: int
    resume_position: int | None
    keep_position: int | None


@dataclass(frozen=True)
class PromptEnds:
    """Prompts whose last query is in this step, in the order of their observations.

    Args:
        request: int64 [n]. Row of the batch.
        prompt_len: int64 [n]. Tokens of the prompt.
        num_spans: int64 [n]. Spans to compact.
        num_observed: int64 [n]. Queries of the observation window.
    """

    request: Int64Array
    prompt_len: Int64Array
    num_spans: Int64Array
    num_observed: Int64Array


@dataclass
class Wave:
    """Queries past their prompts that can attend at once.

    Args:
        due_request: Rows of the batch whose span ``due_span`` is compacted first.
        due_span: That span.
        token: Queries, as indices into the step's tokens.
        request: Their rows of the batch.
        seq_len: Tokens that each attends to, itself included.
        thin_spans: Spans that each sees thin.
    """

    due_request: list[int] = field(default_factory=list)
    due_span: list[int] = field(default_factory=list)
    token: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    request: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    seq_len: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    thin_spans: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Step:
    """What a forward pass has to do, in order; see the module docstring."""

    prefill: Prefill | None
    observations: list[Observation]
    prompt_ends: PromptEnds | None
    waves: list[Wave]


def sort_step(
    rule: SpanRule,
    observation_window: int,
    query_start: Int64Array,
    seq_len: Int64Array,
    prompt_len: Int64Array,
) -> Step:
    """Sort a batch.

    Args:
        rule: When spans are thin.
        observation_window: Last prompt queries that choose channels.
        query_start: int64 [n + 1]. Start of each request's queries in the step's tokens.
        seq_len: int64 [n]. Tokens of each request after this step.
        prompt_len: int64 [n]. Tokens of each request's prompt.

    Returns:
        The sorted step. Requests without queries in it appear nowhere.
    """
    num_queries = np.diff(query_start)
    computed = seq_len - num_queries
    if np.all(computed >= prompt_len) and np.all(num_queries == 1):
        return Step(None, [], None, [_decode_wave(rule, query_start[:-1], computed, prompt_len)])

    in_prompt = np.flatnonzero((computed < prompt_len) & (num_queries > 0))
    prompt_end = np.minimum(seq_len, prompt_len)[in_prompt]
    prefill = None
    if in_prompt.size:
        prefill = Prefill(
            request=in_prompt,
            first_token=query_start[in_prompt],
            num_tokens=prompt_end - computed[in_prompt],
            seq_len=prompt_end,
        )
    observations = _observe(observation_window, prefill, computed, prompt_len)
    ends = in_prompt[prompt_end == prompt_len[in_prompt]]
    prompt_ends = None
    if ends.size:
        lengths = prompt_len[ends]
        spans = rule.thin_spans_array(lengths, lengths)
        prompt_ends = PromptEnds(ends, lengths, spans, np.minimum(lengths, observation_window))
    waves = _waves(rule, query_start, computed, seq_len, prompt_len)
    return Step(prefill, observations, prompt_ends, waves)


def _observe(
    window: int, prefill: Prefill | None, computed: Int64Array, prompt_len: Int64Array
) -> list[Observation]:
    if prefill is None:
        return []
    found = []
    rows = zip(
        prefill.request, prefill.first_token, prefill.num_tokens, prefill.seq_len, strict=True
    )
    for request, first_token, num_tokens, end in rows:
        start = int(computed[request])
        length = int(prompt_len[request])
        window_start = max(0, length - window)
        if end <= window_start:
            continue
        observed_from = max(start, window_start)
        found.append(
            Observation(
                request=int(request),
                begin=int(first_token) + observed_from - start,
                end=int(first_token + num_tokens),
                resume_position=start - 1 if start > window_start else None,
                keep_position=int(end) - 1 if end < length else None,
            )
        )
    return found


def _decode_wave(
    rule: SpanRule, token: Int64Array, position: Int64Array, prompt_len: Int64Array
) -> Wave:
    """One query per request, all of them past their prompts."""
    thin = rule.thin_spans_array(prompt_len, position)
    before = rule.thin_spans_array(prompt_len, np.maximum(prompt_len, position - 1))
    due = np.flatnonzero(thin > before)
    return Wave(
        due_request=due.tolist(),
        due_span=before[due].tolist(),
        token=token,
        request=np.arange(token.size),
        seq_len=position + 1,
        thin_spans=thin,
    )


def _waves(
    rule: SpanRule,
    query_start: Int64Array,
    computed: Int64Array,
    seq_len: Int64Array,
    prompt_len: Int64Array,
) -> list[Wave]:
    parts: list[list[tuple[Int64Array, ...]]] = []
    waves: list[Wave] = []
    for request in np.flatnonzero(seq_len > np.maximum(computed, prompt_len)):
        start, length = int(computed[request]), int(prompt_len[request])
        position = np.arange(max(start, length), int(seq_len[request]))
        lengths = np.full(position.size, length)
        thin = rule.thin_spans_array(lengths, position)
        # The last query before these saw one span fewer if one is due at the very first.
        first = rule.thin_spans(length, max(length, int(position[0]) - 1))
        # One position makes at most one span due, so thin - thin[0] numbers the waves.
        number = thin - thin[0]
        for wave in range(int(number[-1]) + 1):
            if wave == len(waves):
                waves.append(Wave())
                parts.append([])
            chosen = np.flatnonzero(number == wave)
            if wave > 0 or thin[0] > first:
                waves[wave].due_request.append(int(request))
                waves[wave].due_span.append(int(thin[chosen[0]]) - 1)
            parts[wave].append(
                (
                    query_start[request] + position[chosen] - start,
                    np.full(chosen.size, request),
                    position[chosen] + 1,
                    thin[chosen],
                )
            )
    for filled, rows in zip(waves, parts, strict=True):
        filled.token, filled.request, filled.seq_len, filled.thin_spans = (
            np.concatenate(column) for column in zip(*rows, strict=True)
        )
    return waves
