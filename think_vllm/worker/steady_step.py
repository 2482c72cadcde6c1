"""The common step: every request has one query past its prompt, and no span is due."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from think_vllm.plan.spans import RowLimits, SpanRule
from think_vllm.worker.step import Int64Array

if TYPE_CHECKING:
    from think_vllm.hooks.model_runner import StepRows


def steady_spans(
    rule: SpanRule, rows: StepRows, seq_len: Int64Array, limits: RowLimits | None
) -> Int64Array | None:
    """Spans that each query of such a step sees thin, in few operations.

    Args:
        rule: When spans are thin.
        rows: The step's requests, each with one query.
        seq_len: int64 [n]. Tokens of each after the step.
        limits: Of the requests; None if all have the rule's.

    Returns:
        int64 [n], as ``sort_step`` has them; None if a prompt runs or has just ended, or a span
        is due.
    """
    # The first query past a prompt is at position P, so it has P + 1 tokens.
    if (seq_len <= rows.prompt_lens + rule.delay_prompt).any():
        return None
    if rule.prune_decode:
        recent = rule.recent_window if limits is None else limits.recent_window
        spans, rest = np.divmod(seq_len - (1 + recent), rule.span_tokens)
        if not rest.all():
            return None
    elif rule.budget_spans:
        spans = rule.prompt_spans_array(rows.prompt_lens, limits)
    else:
        return None
    thin_spans: Int64Array = np.maximum(np.maximum(spans, 0), rows.cached_spans)
    return thin_spans
