"""What decode rows see thin, found out on the GPU: the host need not know a length."""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase
from csrc_triton.checks import check_tensor
from think_vllm.planner import BlockPlan
from think_vllm.spans import SpanRule

#: Rows of a program.
ROWS = 128
WARPS = 1


def plan_rows(
    seq_lens: torch.Tensor,
    prompt_lens: torch.Tensor,
    rule: SpanRule,
    thin_spans_out: torch.Tensor,
    due_out: torch.Tensor,
) -> None:
    """Find the thin spans of single decode queries, and the spans that are due at them.

    The query of a row is its last token, at position ``seq_len - 1``. The rule is
    ``think_vllm/spans.py``'s; the launch depends on the number of rows only.

    Args:
        seq_lens: ``[R]`` int32. Tokens that a query attends to, its own included; 0 for padding.
        prompt_lens: ``[R]`` int32. Tokens of its request's prompt.
        rule: When spans are thin.
        thin_spans_out: ``[R]`` int32. Written: spans that the query sees thin, 0 for padding and
            for queries of a prompt.
        due_out: ``[R]`` int32. Written: the span that becomes thin at exactly this position, -1
            if there is none.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    shape, device = (seq_lens.numel(),), seq_lens.device
    for name, tensor in (
        ("seq_lens", seq_lens),
        ("prompt_lens", prompt_lens),
        ("thin_spans_out", thin_spans_out),
        ("due_out", due_out),
    ):
        check_tensor("plan_rows", name, tensor, torch.int32, shape, device)
    if shape[0] == 0:
        return
    rows_kernel[(triton.cdiv(shape[0], ROWS),)](
        seq_lens,
        prompt_lens,
        thin_spans_out,
        due_out,
        shape[0],
        **_constants(rule),
        num_warps=WARPS,
    )


def _constants(rule: SpanRule) -> dict[str, object]:
    return {
        "SPAN_TOKENS": rule.span_tokens,
        "RECENT": rule.recent_window,
        "PRUNE_DECODE": rule.prune_decode,
        "ROWS": ROWS,
    }


@triton.jit
def rows_kernel(
    seq_ptr, prompt_ptr, thin_ptr, due_ptr, num_rows,
    SPAN_TOKENS: tl.constexpr, RECENT: tl.constexpr, PRUNE_DECODE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One program per tile of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < num_rows
    position = tl.load(seq_ptr + row, mask=mask, other=0) - 1
    prompt = tl.load(prompt_ptr + row, mask=mask, other=0)
    # The query before this one; the prompt's end compacts what is due then.
    before = tl.maximum(prompt, position - 1)
    end = position if PRUNE_DECODE else prompt
    end_before = before if PRUNE_DECODE else prompt
    answers = (position >= prompt) & (position >= 0)
    thin = tl.where(answers, tl.maximum(end - RECENT, 0) // SPAN_TOKENS, 0)
    thin_before = tl.maximum(end_before - RECENT, 0) // SPAN_TOKENS
    tl.store(thin_ptr + row, thin, mask=mask)
    tl.store(due_ptr + row, tl.where(thin > thin_before, thin_before, -1), mask=mask)


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles. The dtype does not matter here."""
    signature = dict.fromkeys(("seq_ptr", "prompt_ptr", "thin_ptr", "due_ptr"), "*i32:16")
    signature["num_rows"] = "i32"
    return [AotCase(rows_kernel, signature, _constants(plan.rule), {"num_warps": WARPS})]
