"""VLLM's FlashAttention, over a step's own keys and over dense blocks, which have its form."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def load_flash(head_size: int, logits_soft_cap: float) -> Callable[..., Any] | None:
    """Find causal attention over prompts, which reads keys as they are or from pages.

    Imported here and not above: the module behind it exists on GPUs only. Asks for the current
    config, so it is called while layers are built.

    Args:
        head_size: Channels of a head.
        logits_soft_cap: Of the layer, 0 for none.

    Returns:
        ``flash_attn_varlen_func`` in the version for this GPU; None where there is none.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(
        head_size=head_size, requires_softcap=logits_soft_cap > 0
    )
    if version is None:
        return None
    return partial(fa_utils.flash_attn_varlen_func, causal=True, fa_version=version)


def flash_prompts(
    flash: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    max_len: int,
    scale: float,
    logits_soft_cap: float,
    out: torch.Tensor,
) -> None:
    """Attend causally within prompts that lie one behind the other.

    Args:
        flash: Of ``load_flash``.
        query: ``[tokens, Hq, D]``.
        key: ``[tokens, Hk, D]``.
        value: ``[tokens, Hk, D]``.
        starts: ``[n + 1]`` int32. Start of each prompt in the tokens.
        max_len: Tokens of the longest one, a host number.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        out: ``[tokens, Hq, D]``. Written.
    """
    flash(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=max_len,
        max_seqlen_k=max_len,
        softmax_scale=scale,
        softcap=logits_soft_cap,
    )


def flash_pages(
    flash: Callable[..., Any],
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    pages: torch.Tensor,
    starts: torch.Tensor,
    seq_len: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    logits_soft_cap: float,
    out: torch.Tensor,
) -> None:
    """Attend with the last queries of contexts that are dense blocks, causally.

    FlashAttention gives what lies behind a context the weight zero, which leaves a NaN a NaN, and
    may read whole blocks: the rest of a context's last one must hold finite values.

    Args:
        flash: Of ``load_flash``.
        query: ``[tokens, Hq, D]``.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Rows of a key and a value (``layout.py``).
        pages: ``[n, width]`` int32. Blocks of each request.
        starts: ``[n + 1]`` int32. Start of each request's queries.
        seq_len: ``[n]`` int32. Tokens that the last query of each attends to.
        max_query_len: Most queries of a request, a host number.
        max_seq_len: Most tokens of ``seq_len``, a host number.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        out: ``[tokens, Hq, D]``. Written.
    """
    # Strides of heads and tokens are multiples of 16 bytes, as its wide loads want them.
    pages_first, head_size = kv_cache.transpose(1, 2), query.shape[2]
    keys, values = pages_first[..., :head_size], pages_first[..., head_size:]
    flash(
        q=query,
        k=keys,
        v=values,
        out=out,
        cu_seqlens_q=starts,
        seqused_k=seq_len,
        block_table=pages,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_seq_len,
        softmax_scale=scale,
        softcap=logits_soft_cap,
    )
