"""What eviction has to do in a step: whose queries are watched, and whose prompts are packed.

Numpy only, like ``step.py``. Prompts within the budget appear nowhere here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from think_vllm.plan.spans import SpanRule
from think_vllm.worker.step import Int64Array, Prefill, Wave


@dataclass(frozen=True)
class Watched:
    """Queries of a prompt whose attention says which of its old tokens are kept.

    Args:
        request: Id of the request.
        row: Row of the batch.
        begin: First of the queries, as an index into the step's tokens.
        end: One past the last.
        position: Of the first query in the prompt.
        prompt_len: Tokens of the prompt.
        kept_spans: Spans that hold what is kept of it.
        starts: Whether no earlier step has had any of them.
    """

    request: str
    row: int
    begin: int
    end: int
    position: int
    prompt_len: int
    kept_spans: int
    starts: bool

    @property
    def ends(self) -> bool:
        """Whether they are the prompt's last."""
        return self.position + self.end - self.begin == self.prompt_len


@dataclass(frozen=True)
class Pack:
    """A prompt whose old tokens are packed before any query past it attends.

    Args:
        request: Id of the request.
        row: Row of the batch.
        prompt_len: Tokens of the prompt.
        first_span: First span that holds kept tokens; those before it are left empty.
        num_spans: Spans that hold kept tokens.
    """

    request: str
    row: int
    prompt_len: int
    first_span: int
    num_spans: int


def watch(
    rule: SpanRule,
    window: int | None,
    prefill: Prefill | None,
    prompt_lens: Int64Array,
    evicted: Int64Array,
    requests: Sequence[str],
) -> list[Watched]:
    """Find the queries of a step that choose tokens.

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
        chosen = 0 if window is None else max(0, prompt_len - window)
        if end > chosen:
            first = int(prefill.first_token[i])
            found.append(
                Watched(
                    request=requests[row],
                    row=row,
                    begin=first + max(start, chosen) - start,
                    end=first + end - start,
                    position=max(start, chosen),
                    prompt_len=prompt_len,
                    kept_spans=rule.prompt_spans(prompt_len) - int(evicted[row]),
                    starts=start <= chosen,
                )
            )
    return found


def take_packs(
    rule: SpanRule,
    wave: Wave,
    prompt_lens: Int64Array,
    evicted: Int64Array,
    requests: Sequence[str],
) -> list[Pack]:
    """Take the spans of prompts that are packed out of a wave's due spans.

    Args:
        rule: When spans are thin.
        wave: Its due spans are all compacted otherwise. Changed.
        prompt_lens: int64 [n]. Tokens of each row's prompt.
        evicted: int64 [n]. Empty spans of each row.
        requests: [n]. Id of each row's request.
    """
    if rule.budget_spans is None or not wave.due_request:
        return []
    row, span = np.array(wave.due_request), np.array(wave.due_span)
    # Rows with empty spans have the rule's recent window.
    packed = (evicted[row] > 0) & (span < rule.prompt_spans_array(prompt_lens[row]))
    rest = np.flatnonzero(~packed)
    wave.due_request = [wave.due_request[i] for i in rest]
    wave.due_span = [wave.due_span[i] for i in rest]
    wave.due_kept = [wave.due_kept[i] for i in rest]
    return [
        Pack(
            request=requests[i],
            row=int(i),
            prompt_len=int(prompt_lens[i]),
            first_span=int(evicted[i]),
            num_spans=rule.prompt_spans(int(prompt_lens[i])) - int(evicted[i]),
        )
        for i in np.unique(row[packed])
    ]
