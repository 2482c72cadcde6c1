"""VLLM's FlashAttention, for prompts that need nothing from the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch


def load_flash(head_size: int, logits_soft_cap: float) -> Callable[..., Any] | None:
    """Find causal attention over ``q``, ``k`` and ``v`` of several prompts.

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
