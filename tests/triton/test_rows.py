import pytest
import torch

from csrc_triton.rows import plan_rows
from think_vllm.spans import SpanRule


def plan(seq_lens, prompt_lens, rule, device):
    """Thin spans and due spans, as lists."""
    tensors = [torch.tensor(v, dtype=torch.int32, device=device) for v in (seq_lens, prompt_lens)]
    thin, due = torch.full((2, len(seq_lens)), -99, dtype=torch.int32, device=device)
    plan_rows(*tensors, rule, thin, due)
    return thin.tolist(), due.tolist()


@pytest.mark.parametrize("prune_decode", [True, False])
@pytest.mark.parametrize(("span_blocks", "recent_window"), [(2, 0), (2, 5), (3, 9)])
def test_plan_rows_is_the_rule(device, prune_decode, span_blocks, recent_window):
    rule = SpanRule(4, span_blocks, 1, recent_window, prune_decode)
    rows = [(prompt, seq) for prompt in range(1, 40) for seq in range(80)]
    prompt_lens, seq_lens = zip(*rows, strict=True)
    thin, due = plan(seq_lens, prompt_lens, rule, device)
    for (prompt, seq), thin_spans, span in zip(rows, thin, due, strict=True):
        position = seq - 1
        expected = rule.thin_spans(prompt, position) if seq else 0
        assert thin_spans == expected, (prompt, seq)
        # A span that was thin when the prompt ended is not due afterwards.
        before = rule.thin_spans(prompt, max(prompt, position - 1)) if position >= prompt else 0
        assert span == (before if expected > before else -1), (prompt, seq)
        if span >= 0:
            assert position == rule.due_position(span)


def test_plan_rows_of_padding_and_prompts(device):
    rule = SpanRule(48, 4, 3, 32, True)
    seq_lens, prompt_lens = [0, 0, 224, 225, 226, 225], [0, 500, 100, 100, 100, 224]
    thin, due = plan(seq_lens, prompt_lens, rule, device)
    assert thin == [0, 0, 0, 1, 1, 1]
    # The last row's prompt ended with 224 tokens and compacted span 0 itself.
    assert due == [-1, -1, -1, 0, -1, -1]


def test_plan_rows_without_rows(device):
    assert plan([], [], SpanRule(48, 4, 3, 32, True), device) == ([], [])


def test_plan_rows_refuses(device):
    rule, good = SpanRule(48, 4, 3, 32, True), torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match=r"plan_rows: prompt_lens is torch\.int64"):
        plan_rows(good, good.long(), rule, good.clone(), good.clone())
    with pytest.raises(ValueError, match=r"plan_rows: due_out is torch\.int32 .2,."):
        plan_rows(good, good, rule, good.clone(), good[:2].clone())
