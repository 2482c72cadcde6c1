"""One step's work, sorted: what has to happen to the batch, and in which order.

Numpy only, knows neither vLLM nor the device; ``step_sorter.py`` does the sorting. In every layer,
after the new keys and values have been stored densely, a forward pass runs

1. ``prefill``: prompt queries attend, as a rule to dense blocks only;
2. ``observations``: queries of the observation window are added to their request's energy;
3. ``finished_prompts``: prompts that end here select their channels and are compacted; with
   ``prune_prefill``, so are ``finished_chunks`` of prompts that go on, each by its last queries;
4. ``passes``: queries past the prompt attend to thin and dense blocks, each pass after the
   spans that became due for it have been compacted. Prompts whose tokens are evicted are repacked
   before that (``eviction_step.py``).

A step has one pass, except when a preempted request recomputes generated tokens: a chunk
that crosses the end of its prompt, or several due positions, needs one pass per position at
which a span becomes thin. So every query sees exactly the blocks that it saw the first time.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from think_vllm.plan.spans import SpanRule

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prefill:
    """Prompt queries of a step."""

    request: Int64Array  # int64 [n]. Row of the batch
    #: int64 [n]. The request's first query, as an index into the step's tokens.
    first_token: Int64Array
    num_tokens: Int64Array  # int64 [n]. How many of its queries are prompt queries
    seq_len: Int64Array  # int64 [n]. Tokens that the last of them attends to, itself included
    thin_spans: Int64Array  # int64 [n]. Spans that they see thin

    def select(self, which: npt.NDArray[np.bool_]) -> "Prefill":
        """The selected requests alone."""
        return Prefill(
            self.request[which],
            self.first_token[which],
            self.num_tokens[which],
            self.seq_len[which],
            self.thin_spans[which],
        )

    def tokens(self) -> Int64Array:
        """All queries, as indices into the step's tokens: int64 [num_tokens.sum()]."""
        ends = np.cumsum(self.num_tokens)
        offset = np.repeat(self.first_token - (ends - self.num_tokens), self.num_tokens)
        indices: Int64Array = np.arange(int(ends[-1])) + offset
        return indices


@dataclass(frozen=True)
class Observation:
    """Queries of one request that lie in its observation window."""

    request: int  # row of the batch
    begin: int  # first of them, as an index into the step's tokens
    end: int  # one past the last
    #: Position whose block keeps the energy of the window's earlier queries, None if there are
    #: none.
    resume_position: int | None
    #: Position whose block shall keep the energy, None if the window ends here.
    keep_position: int | None


@dataclass(frozen=True)
class Selections:
    """Selections of channels where prompts or chunks end, one after the other."""

    end: Int64Array  # int64 [m]. Which of them selects
    first_block: Int64Array  # int64 [m]. First dense block whose keys count
    num_tokens: Int64Array  # int64 [m]. Tokens up to the last one whose key counts
    begin: Int64Array  # int64 [n]. First selection of each
    count: Int64Array  # int64 [n]. Its selections. The last one holds for spans that fall due later
    of_span: Int64Array  # int64 [t]. Selection of each of ``Finished.spans()``


@dataclass(frozen=True)
class Finished:
    """Prompts that end in this step, or chunks of prompts, and what is compacted then."""

    #: Their last queries; for prompts, in the step's ``observations``.
    observations: list[Observation]
    request: Int64Array  # int64 [n]. Row of the batch, in the order of the observations that end
    num_tokens: Int64Array  # int64 [n]. Tokens up to the end
    first_span: Int64Array  # int64 [n]. First span that is dense; those before it are thin
    num_spans: Int64Array  # int64 [n]. Spans to compact
    num_observed: Int64Array  # int64 [n]. Queries that select the channels
    #: bool [n]. Whether the channels are kept for spans that fall due later.
    keeps: npt.NDArray[np.bool_]
    #: bool [n]. Whether tokens are evicted, so that channels are selected once more, for those that
    #: are kept.
    repacked: npt.NDArray[np.bool_]

    def spans(self) -> tuple[Int64Array, Int64Array]:
        """Each span to compact: its index into ``request``, and the span."""
        which = np.repeat(np.arange(self.request.size), self.num_spans)
        return which, self.first_span[which] + count_up(self.num_spans)

    def selections(self, rule: SpanRule, per_span: bool) -> Selections:
        """What channels are selected over.

        Args:
            rule: When spans are thin.
            per_span: Whether every span is a selection of its own. A prompt or chunk without spans
                selects over all keys that are dense, and so do all if this is not set.
        """
        which, _ = self.spans()
        spans = np.zeros_like(self.num_spans)
        if per_span:
            spans = self.num_spans
            if rule.delay_prompt:  # they are compacted in the next step, and selected for now
                old = rule.prompt_spans_array(self.num_tokens)
                spans = np.maximum(0, old - self.first_span)
        count = np.maximum(1, spans)
        begin = np.cumsum(count) - count
        end = np.repeat(np.arange(count.size), count)
        span = self.first_span[end] + count_up(count)
        all_tokens = self.num_tokens[end]
        return Selections(
            end=end,
            first_block=span * rule.span_blocks,
            num_tokens=np.where(spans[end] > 0, (span + 1) * rule.span_tokens, all_tokens),
            begin=begin,
            count=count,
            of_span=begin[which] + (count_up(self.num_spans) if per_span else 0),
        )


@dataclass
class DecodePass:
    """Queries past their prompts that can attend at once."""

    #: Rows of the batch whose span ``due_span`` is compacted first.
    due_request: list[int] = field(default_factory=list)
    due_span: list[int] = field(default_factory=list)  # that span, ascending within a request
    #: Whether its channels were kept at the prompt's end; else the span before it has them in its
    #: table.
    due_kept: list[bool] = field(default_factory=list)
    #: Queries, as indices into the step's tokens.
    token: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    #: Their rows of the batch.
    request: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    #: Tokens that each attends to, itself included.
    seq_len: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))
    #: Spans that each sees thin.
    thin_spans: Int64Array = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Step:
    """What a forward pass has to do, in order; see the module docstring."""

    prefill: Prefill | None
    observations: list[Observation]
    finished_prompts: Finished | None
    finished_chunks: Finished | None
    passes: list[DecodePass]


def count_up(counts: Int64Array) -> Int64Array:
    """``0 .. count - 1`` for each count, one after the other."""
    ends = np.cumsum(counts)
    ups: Int64Array = np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(
        ends - counts, counts
    )
    return ups
