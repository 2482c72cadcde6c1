"""Scratch blocks: prompts side by side, whatever the memory held before."""

import numpy as np
import pytest
import torch
import vllm._C  # noqa: F401 - registers vLLM's CPU operators
from vllm import _custom_ops as ops

from think_vllm.attention.cpu_scratch import PromptScratch


def attend(
    scratch: PromptScratch, table: torch.Tensor, query: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """VLLM's kernel over the scratch blocks."""
    num_blocks, num_kv_heads, block_size, width = scratch.blocks.shape
    halves = scratch.blocks.view(num_blocks, num_kv_heads, 2 * block_size, width // 2)
    key_cache, value_cache = halves.chunk(2, dim=2)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(lengths),
        num_heads=query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=width // 2,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=scratch.isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    out = torch.full_like(query, float("nan"))
    ops.cpu_attention_with_kv_cache(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=out,
        query_start_loc=starts,
        seq_lens=seq_lens,
        scale=0.125,
        causal=True,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=table,
        softcap=0,
        scheduler_metadata=metadata,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return out


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
    out = attend(scratch, table, query, lengths)
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
