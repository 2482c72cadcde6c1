"""Decode attention of others, beside which ours is timed: vLLM's and torch's.

Each maker takes queries ``[R, Hq, D]``, the number of KV heads, a context in tokens and memory
(uint8) that its cache may use, and returns a function that runs the kernel once, and the bytes that
the kernel has to read. It raises ImportError, RuntimeError or ValueError where its kernel is
missing or does not work. Caches hold whatever the memory does: speed does not depend on it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

BLOCK = 16
#: As vLLM's Triton backend: rows times KV heads up to which it splits contexts, and in how many.
LEAST_PROGRAMS = 128
SEGMENTS = 16
#: Bytes that a token's scale takes in each head of a 4-bit cache, for keys and for values.
SCALE_BYTES = 4


class Kernel(NamedTuple):
    """A kernel that is ready to run, and the bytes that it has to read each time."""

    run: Callable[[], Any]
    num_bytes: int


Maker = Callable[[torch.Tensor, int, int, torch.Tensor], Kernel]


class Rows(NamedTuple):
    """What kernels over paged caches know of a batch."""

    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    num_blocks: int


def rows_of(query: torch.Tensor, context: int) -> Rows:
    """A batch of contexts of one length, in blocks of 16 in random order."""
    num_seqs, device = len(query), query.device
    width = -(-context // BLOCK)
    order = torch.randperm(num_seqs * width, device=device)
    return Rows(
        table=order.to(torch.int32).view(num_seqs, width),
        starts=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        lengths=torch.full((num_seqs,), context, dtype=torch.int32, device=device),
        num_blocks=num_seqs * width,
    )


def take(memory: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in the first bytes of memory.

    Raises:
        ValueError: If it does not fit.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    if size > memory.numel():
        raise ValueError(f"{shape} of {dtype} take {size} bytes; there are {memory.numel()}")
    return memory[:size].view(dtype).view(shape)


def torch_kernel(
    query: torch.Tensor, num_kv_heads: int, context: int, memory: torch.Tensor
) -> Kernel:
    """Torch's attention over contiguous keys and values."""
    num_seqs, _, head_size = query.shape
    shape = (2, num_seqs, num_kv_heads, context, head_size)
    keys, values = take(memory, shape, query.dtype)
    attention = torch.nn.functional.scaled_dot_product_attention
    return Kernel(
        lambda: attention(query[:, :, None], keys, values, enable_gqa=True),
        2 * keys.numel() * keys.itemsize,
    )


def flash_version(head_size: int) -> int | None:
    """Version of FlashAttention that vLLM takes on this GPU; its function defaults to 2."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    except ImportError:
        return None
    version: int | None = get_flash_attn_version(head_size=head_size)
    return version


def flash_kernel(version: int, cache_dtype: torch.dtype | None = None) -> Maker:
    """FlashAttention of vLLM over its paged cache, of the queries' dtype or of fp8.

    With an fp8 cache the queries are fp8, too, as in vLLM.
    """

    def make(query: torch.Tensor, num_kv_heads: int, context: int, memory: torch.Tensor) -> Kernel:
        from vllm.vllm_flash_attn.flash_attn_interface import (
            flash_attn_varlen_func,
            is_fa_version_supported,
        )

        if not is_fa_version_supported(version):
            raise RuntimeError(f"FlashAttention {version} does not load here")
        rows = rows_of(query, context)
        dtype = cache_dtype or query.dtype
        shape = (2, rows.num_blocks, BLOCK, num_kv_heads, query.shape[2])
        keys, values = take(memory, shape, dtype)
        given = query.to(dtype)
        out = torch.empty_like(query)
        one = torch.ones((), device=query.device).expand(len(query), num_kv_heads)
        descale = {} if cache_dtype is None else dict.fromkeys(("q", "k", "v"), one)
        return Kernel(
            lambda: flash_attn_varlen_func(
                given,
                keys,
                values,
                out=out,
                max_seqlen_q=1,
                cu_seqlens_q=rows.starts,
                max_seqlen_k=context,
                seqused_k=rows.lengths,
                block_table=rows.table,
                causal=True,
                fa_version=version,
                **{f"{name}_descale": scale for name, scale in descale.items()},
            ),
            2 * len(query) * context * num_kv_heads * query.shape[2] * dtype.itemsize,
        )

    return make


def int4_kernel(
    query: torch.Tensor, num_kv_heads: int, context: int, memory: torch.Tensor
) -> Kernel:
    """VLLM's kernel of ``--kv-cache-dtype int4_per_token_head``.

    Its cache holds keys, their float32 scale, values and theirs, for each token of each head.
    """
    from vllm.v1.attention.ops.int4_per_token_head import unified_attention_int4

    rows = rows_of(query, context)
    num_heads, head_size = query.shape[1:]
    packed = head_size // 2
    half = packed + SCALE_BYTES
    cache = take(memory, (rows.num_blocks, num_kv_heads, BLOCK, 2 * half), torch.uint8)
    # As the backend hands them over: [blocks, tokens, heads, bytes].
    keys = cache[..., :packed].transpose(1, 2)
    values = cache[..., half : half + packed].transpose(1, 2)
    scales = cache.view(torch.float32).transpose(1, 2)
    at = packed // SCALE_BYTES
    out = torch.empty_like(query)
    segments = (LEAST_PROGRAMS // num_kv_heads, num_heads, SEGMENTS)
    padded = 1 << (head_size - 1).bit_length()
    partial = query.new_empty(*segments, padded, dtype=torch.float32)
    highest, totals = query.new_empty(2, *segments, dtype=torch.float32)
    return Kernel(
        lambda: unified_attention_int4(
            q=query,
            k_cache=keys,
            v_cache=values,
            out=out,
            cu_seqlens_q=rows.starts,
            max_seqlen_q=1,
            seqused_k=rows.lengths,
            max_seqlen_k=context,
            softmax_scale=head_size**-0.5,
            window_size=(-1, -1),
            block_table=rows.table,
            softcap=0.0,
            sinks=None,
            alibi_slopes=None,
            use_alibi_sqrt=False,
            qq_bias=None,
            output_scale=None,
            mm_prefix_range=None,
            k_scale_cache=scales[..., at],
            v_scale_cache=scales[..., at + half // SCALE_BYTES],
            seq_threshold_3D=segments[0],
            num_par_softmax_segments=SEGMENTS,
            softmax_segm_output=partial,
            softmax_segm_max=highest,
            softmax_segm_expsum=totals,
        ),
        len(query) * context * num_kv_heads * 2 * half,
    )


RIVALS: dict[str, Maker] = {
    "torch": torch_kernel,
    "FlashAttention 3": flash_kernel(3),
    "FlashAttention 2": flash_kernel(2),
    "FlashAttention 3, fp8 cache": flash_kernel(3, torch.float8_e4m3fn),
    "vLLM int4_per_token_head": int4_kernel,
}
