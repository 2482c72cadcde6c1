"""Dense blocks as vLLM's kernels want them."""

import pytest
import torch
import vllm._C  # noqa: F401 - registers vLLM's CPU operators
from vllm import _custom_ops as ops

from think_vllm.attention.cpu_dense import clear_tail, dense_isa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("head_size", "block_size", "isa"),
    [(128, 48, "vec16"), (128, 96, "vec"), (80, 64, "vec16"), (256, 32, "vec")],
)
def test_dense_isa_stores_the_layout_that_thin_blocks_are_made_from(
    dtype: torch.dtype, head_size: int, block_size: int, isa: str
) -> None:
    assert dense_isa(dtype, head_size, block_size) == isa


def attend(cache: torch.Tensor, query: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Let vLLM's kernel attend with the last queries of a context in block 1."""
    _, num_kv_heads, block_size, width = cache.shape
    key_cache, value_cache = cache.view(2, num_kv_heads, 2 * block_size, width // 2).chunk(2, 2)
    starts = torch.tensor([0, query.shape[0]], dtype=torch.int32)
    seq_lens = torch.tensor([seq_len], dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=1,
        num_heads=query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=width // 2,
        seq_lens=seq_lens,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa="vec16",
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype="auto",
    )
    out = torch.empty_like(query)
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
        block_table=torch.tensor([[1]], dtype=torch.int32),
        softcap=0,
        scheduler_metadata=metadata,
        s_aux=None,
        dynamic_causal=None,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    return out


def test_clear_tail_keeps_what_a_block_held_before_out_of_a_prompt() -> None:
    torch.manual_seed(42)
    clean = torch.randn(2, 2, 48, 128)
    clear_tail(clean, 1, 20)
    query = torch.randn(7, 4, 64)
    expected = attend(clean, query, 20)
    dirty = clean.clone()
    halves = dirty[1].view(2, 2, -1)
    halves[:, 0].view(2, 64, 48)[:, :, 20:] = float("nan")
    halves[:, 1].view(2, 48, 64)[:, 20:] = float("nan")
    # This is why the tail is cleared.
    assert attend(dirty, query, 20).isnan().any()
    clear_tail(dirty, 1, 20)
    assert torch.equal(attend(dirty, query, 20), expected)
    assert torch.equal(dirty, clean)


def test_clear_tail_leaves_other_blocks_and_tokens_alone() -> None:
    cache = torch.ones(3, 2, 32, 128)
    clear_tail(cache, 1, 5)
    assert cache[0].all()
    assert cache[2].all()
    assert int(cache[1].sum()) == 2 * 2 * 5 * 64
