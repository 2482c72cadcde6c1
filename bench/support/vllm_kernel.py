"""VLLM's own CPU attention operator, as tests and benchmarks call it."""

from collections.abc import Callable, Sequence

import torch
import vllm._C  # noqa: F401 - registers vLLM's CPU operators
from vllm import _custom_ops as ops


def vllm_attention(
    query: torch.Tensor,
    blocks: torch.Tensor,
    block_table: torch.Tensor,
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    scale: float,
    isa: str,
    kv_cache_dtype: str = "auto",
) -> tuple[Callable[[], None], torch.Tensor]:
    """Prepare causal attention over dense blocks.

    Args:
        query: ``[tokens, Hq, D]``.
        blocks: ``[num_blocks, Hk, N, 2 * D]`` in the form of ``isa``.
        block_table: ``[n, W]`` int32.
        query_lens: Queries of each sequence, its last ones.
        seq_lens: Tokens of each sequence.
        scale: Factor on ``q . k``.
        isa: VLLM's kernel family.
        kv_cache_dtype: Of vLLM's flag of that name; blocks are uint8 for ``fp8``.

    Returns:
        A function that attends, and the output that it writes, ``[tokens, Hq, D]``.
    """
    num_blocks, num_kv_heads, block_size, width = blocks.shape
    halves = blocks.view(num_blocks, num_kv_heads, 2 * block_size, width // 2)
    key_cache, value_cache = halves.chunk(2, dim=2)
    starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
    lengths = torch.tensor(list(seq_lens), dtype=torch.int32)
    metadata = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=len(seq_lens),
        num_heads=query.shape[1],
        num_kv_heads=num_kv_heads,
        head_dim=width // 2,
        seq_lens=lengths,
        dtype=query.dtype,
        query_start_loc=starts,
        causal=True,
        sliding_window_size=-1,
        isa=isa,
        enable_kv_split=True,
        dynamic_causal=None,
        kv_cache_dtype=kv_cache_dtype,
    )
    out = torch.full_like(query, float("nan"))

    def run() -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=out,
            query_start_loc=starts,
            seq_lens=lengths,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=block_table,
            softcap=0,
            scheduler_metadata=metadata,
            s_aux=None,
            dynamic_causal=None,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype=kv_cache_dtype,
        )

    return run, out
