"""Scratch blocks: prompts side by side, whatever the memory held before."""

import numpy as np
import pytest
import torch

from bench.support.vllm_kernel import vllm_attention
from think_vllm.worker.cpu.scratch import PromptScratch


@pytest.mark.parametrize("lengths", [[1], [128], [129, 5, 300], [64, 256, 1, 127]], ids=str)
def test_prompt_scratch_serves_prompts_over_poisoned_memory(lengths: list[int]) -> None:
    torch.manual_seed(42)
    scratch = PromptScratch(2, 64, torch.float32, "vec")
    scratch.place(np.array([1000]))
    scratch.blocks.fill_(float("nan"))
    total = sum(lengths)
    query, key, value = (torch.randn(total, heads, 64) for heads in (4, 2, 2))
    table = scratch.place(np.array(lengths))
    scratch.store(key, value)
    run, out = vllm_attention(query, scratch.blocks, table, lengths, lengths, 0.125, "vec")
    run()
    for part, (q, k, v) in zip(
        out.split(lengths),
        zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True),
        strict=True,
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1),
            k.repeat_interleave(2, dim=1).transpose(0, 1),
            v.repeat_interleave(2, dim=1).transpose(0, 1),
            is_causal=True,
            scale=0.125,
        )
        torch.testing.assert_close(part, expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_prompt_scratch_gives_prompts_blocks_of_their_own() -> None:
    scratch = PromptScratch(1, 64, torch.float32, "vec")
    table = scratch.place(np.array([130, 1, 256]))
    used = [table[0, :2].tolist(), table[1, :1].tolist(), table[2, :2].tolist()]
    assert used == [[0, 1], [2], [3, 4]]
    assert int(table.max()) < scratch.blocks.shape[0]
