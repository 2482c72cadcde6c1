"""What eviction does in a step: whose attention is accumulated, whose prompts are repacked.

Numpy only, like ``step.py``. Prompts within the budget appear nowhere here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step import DecodePass, Int64Array, Prefill


@dataclass(frozen=True)
class Accumulation:
    """Queries of a prompt whose attention says which of its old tokens are kept."""

    request: str  # id of the request
    row: int  # row of the batch
    begin: int  # first of the queries, as an index into the step's tokens
    end: int  # one past the last
    position: int  # of the first query in the prompt
    prompt_len: int  # tokens of the prompt
    kept_spans: int  # spans that hold what is kept of it
    starts: bool  # whether no earlier step has had any of them

    @property
    def ends(self) -> bool:
        """Whether they are the prompt's last."""
        return self.position + self.end - self.begin == self.prompt_len


@dataclass(frozen=True)
class Repack:
    """A prompt whose old tokens are repacked before any query past it attends."""

    request: str  # id of the request
    row: int  # row of the batch
    prompt_len: int  # tokens of the prompt
    first_span: int  # first span that holds kept tokens; those before it are left empty
    num_spans: int  # spans that hold kept tokens


def find_accumulations(
    rule: SpanRule,
    window: int | None,
    prefill: Prefill | None,
    prompt_lens: Int64Array,
    evicted: Int64Array,
    requests: Sequence[str],
) -> list[Accumulation]:
    """Find the queries of a step that select tokens.

    Args:
        rule: When spans are thin.
        window: Last queries of a prompt that do; None for all of them.
        prefill: The step's prompt queries.
        prompt_lens: int64 [n]. Tokens of each row's prompt.
        evicted: int64 [n]. Empty spans of each row.
        requests: [n]. Id of each row's request.
    """
    if prefill is None:
        return []
    found = []
    for i in np.flatnonzero(evicted[prefill.request]):
        row, end = int(prefill.request[i]), int(prefill.seq_len[i])
        prompt_len = int(prompt_lens[row])
        start = end - int(prefill.num_tokens[i])
        selected = 0 if window is None else max(0, prompt_len - window)
        if end > selected:
            first = int(prefill.first_token[i])
            found.append(
                Accumulation(
                    request=requests[row],
                    row=row,
                    begin=first + max(start, selected) - start,
                    end=first + end - start,
                    position=max(start, selected),
                    prompt_len=prompt_len,
                    kept_spans=rule.prompt_spans(prompt_len) - int(evicted[row]),
                    starts=start <= selected,
                )
            )
    return found


def take_repacks(
    rule: SpanRule,
    decode: DecodePass,
    prompt_lens: Int64Array,
    evicted: Int64Array,
    requests: Sequence[str],
) -> list[Repack]:
    """Take the spans of prompts that are repacked out of a pass's due spans.

    Args:
        rule: When spans are thin.
        decode: The pass. Its due spans are all compacted otherwise. Changed.
        prompt_lens: int64 [n]. Tokens of each row's prompt.
        evicted: int64 [n]. Empty spans of each row.
        requests: [n]. Id of each row's request.
    """
    if rule.budget_spans is None or not decode.due_request:
        return []
    row, span = np.array(decode.due_request), np.array(decode.due_span)
    # Rows with empty spans have the rule's recent window.
    repacked = (evicted[row] > 0) & (span < rule.prompt_spans_array(prompt_lens[row]))
    rest = np.flatnonzero(~repacked)
    decode.due_request = [decode.due_request[i] for i in rest]
    decode.due_span = [decode.due_span[i] for i in rest]
    decode.due_kept = [decode.due_kept[i] for i in rest]
    return [
        Repack(
            request=requests[i],
            row=int(i),
            prompt_len=int(prompt_lens[i]),
            first_span=int(evicted[i]),
            num_spans=rule.prompt_spans(int(prompt_lens[i])) - int(evicted[i]),
        )
        for i in np.unique(row[repacked])
    ]
