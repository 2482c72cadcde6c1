"""Dense blocks as vLLM's kernels want them."""

import pytest
import torch

from bench.support.vllm_kernel import vllm_attention
from think_vllm.worker.cpu.dense import clear_tail, dense_isa


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
    table = torch.tensor([[1]], dtype=torch.int32)
    run, out = vllm_attention(query, cache, table, [query.shape[0]], [seq_len], 0.125, "vec16")
    run()
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
