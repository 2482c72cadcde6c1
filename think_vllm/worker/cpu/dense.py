"""What thin blocks ask of vLLM's own CPU kernels, and what these ask of dense blocks."""

import functools

import torch
from vllm import _custom_ops as ops

from think_vllm.errors import REMEDY, ThinkError


@functools.cache
def dense_isa(dtype: torch.dtype, head_size: int, block_size: int) -> str:
    """Kernel family of vLLM that stores dense blocks in the form of ``layout.py``.

    Checked by storing a block and reading it back, once per shape, because vLLM promises no
    layout.

    Args:
        dtype: Of the cache.
        head_size: Channels of a key.
        block_size: Tokens of a block.

    Returns:
        The ``isa`` argument of vLLM's CPU attention operators.

    Raises:
        ThinkError: If vLLM's kernels on this machine use another layout.
    """
    isa = "vec" if block_size % 32 == 0 and head_size % 32 == 0 else "vec16"
    run = torch.zeros(1, 1, 2 * block_size, head_size, dtype=dtype)
    # Integers up to 256 are exact in every cache dtype.
    key = (torch.arange(block_size * head_size) % 251).to(dtype).view(block_size, 1, head_size)
    value = (torch.arange(block_size * head_size) % 241).to(dtype).view(block_size, 1, head_size)
    key_cache, value_cache = run.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        key,
        value,
        key_cache,
        value_cache,
        torch.arange(block_size),
        isa,
        k_scale=1.0,
        v_scale=1.0,
        kv_cache_dtype="auto",
    )
    stored = run.view(2, -1)
    channel_major = torch.equal(stored[0].view(head_size, block_size), key[:, 0].T)
    token_major = torch.equal(stored[1].view(block_size, head_size), value[:, 0])
    if not (channel_major and token_major):
        raise ThinkError(
            f"thin KV blocks: vLLM's CPU kernels ({isa}) lay out {dtype} blocks on this "
            f"machine in a way that thin blocks cannot be made from. {REMEDY}"
        )
    return isa


def clear_tail(kv_cache: torch.Tensor, block: int, num_tokens: int) -> None:
    """Set what lies behind the last token of a dense block to zero.

    VLLM's kernels read whole blocks and give what lies beyond a context the weight zero, which
    leaves a NaN a NaN. A block that was thin before has a channel table there, whose bytes can
    spell one.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Written.
        block: The block.
        num_tokens: Tokens that it holds.
    """
    num_kv_heads, block_size, width = kv_cache.shape[1:]
    halves = kv_cache[block].view(num_kv_heads, 2, -1)
    halves[:, 0].view(num_kv_heads, width // 2, block_size)[:, :, num_tokens:] = 0
    halves[:, 1].view(num_kv_heads, block_size, width // 2)[:, num_tokens:] = 0
