"""Which old tokens of a prompt a served model keeps: the published formulas, on whole matrices.

SnapKV, arXiv 2404.14469, as kvpress writes it for grouped queries; H2O, arXiv 2306.14048.
"""

import torch
from torch import Tensor

#: SnapKV's authors' setting for LongBench.
POOLING_TOKENS = 7


def token_scores(
    query: Tensor,
    key: Tensor,
    scaling: float,
    method: str,
    window: int,
    old_tokens: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Score each old token of a prompt, [heads, P, D], for KV heads: float64 [Hk, old_tokens].

    For ``scaling``, ``softcap`` and ``sinks`` see ``thin_attention``.
    """
    length, group = key.shape[1], query.shape[0] // key.shape[0]
    first = max(0, length - window) if method == "snapkv" else 0
    position = torch.arange(length)
    hidden = position[None, :] > position[first:, None]
    total = torch.zeros(key.shape[0], length, dtype=torch.float64)
    for head in range(query.shape[0]):
        scores = query[head, first:].double() @ key[head // group].double().T * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].double().expand(len(scores), 1)], dim=1)
        total[head // group] += torch.softmax(scores, dim=1)[:, :length].sum(dim=0) / group
    if method == "snapkv":
        scored = total[:, : max(old_tokens, first)]
        padded = torch.nn.functional.pad(scored, (POOLING_TOKENS // 2, POOLING_TOKENS // 2))
        total = padded.unfold(1, POOLING_TOKENS, 1).mean(dim=2)
    return total[:, :old_tokens]


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """Tokens with the highest scores of each head: bool like ``scores``."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(count, dim=1).indices, True)


def token_margin(scores: Tensor, count: int) -> float:
    """How much the least kept token of any head scores over the best evicted one, relatively."""
    best = scores.topk(count + 1, dim=1).values
    return float((1 - best[:, -1] / best[:, -2]).min())
