"""The choice of channels, written a second time: scores, what is kept, and by what margin."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.support.reference import Thinning


def channel_scores(
    query: Tensor, key: Tensor, prompt_len: int, thinning: Thinning, tokens: Tensor | None = None
) -> Tensor:
    """Score of each channel over the ``tokens`` that are kept: float64 [S, Hk, D].

    ``S`` is 1, or the prompt's spans if each has channels of its own.
    """
    group = query.shape[0] // key.shape[0]
    window = query[:, max(0, prompt_len - thinning.observation_window) : prompt_len].double()
    energy = window.square().mean(dim=1)  # [Hq, D]
    energy = energy.view(-1, group, energy.shape[-1]).mean(dim=1)  # [Hk, D]
    if thinning.select == "key-norm":
        energy = torch.ones_like(energy)
    squares = key[:, :prompt_len].double().square()
    spans = thinning.old_tokens(prompt_len) // thinning.span_tokens
    if thinning.tables == "span" and spans:
        old = squares[:, : spans * thinning.span_tokens]
        by_span = old.view(len(key), spans, thinning.span_tokens, -1).mean(dim=2)
        return energy * by_span.transpose(0, 1)
    if tokens is None:
        return (energy * squares.mean(dim=1))[None]
    counted = tokens[:, :prompt_len, None].double()
    return (energy * ((squares * counted).sum(dim=1) / counted.sum(dim=1)))[None]


def kept_channels(
    query: Tensor, key: Tensor, prompt_len: int, thinning: Thinning, tokens: Tensor | None = None
) -> Tensor:
    """The choice over the ``tokens`` that are kept: bool [Hk, n, D], true for kept channels.

    What is decoded keeps the channels of the span before it.
    """
    score = channel_scores(query, key, prompt_len, thinning, tokens)
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.scatter_(2, score.topk(thinning.key_channels, dim=2).indices, True)
    span = torch.arange(key.shape[1]) // thinning.span_tokens
    return kept[span.clamp(max=len(kept) - 1)].transpose(0, 1)


def value_scores(answers: Tensor, num_kv_heads: int, thinning: Thinning) -> Tensor:
    """What each value channel adds to the observation window's answers: float64 [Hk, D].

    The answers, [Hq, n, D], are attention's output for the prompt: weights times values.
    """
    energy = answers[:, -thinning.observation_window :].double().square().mean(dim=1)
    return energy.view(num_kv_heads, -1, energy.shape[-1]).mean(dim=1)


def kept_value_channels(answers: Tensor, num_kv_heads: int, thinning: Thinning) -> Tensor:
    """Value channels that are kept, in all tokens: bool [Hk, D]."""
    score = value_scores(answers, num_kv_heads, thinning)
    count = score.shape[1] if thinning.value_channels is None else thinning.value_channels
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter_(1, score.topk(count, dim=1).indices, True)


def selection_margin(query: Tensor, key: Tensor, prompt_len: int, thinning: Thinning) -> float:
    """How much the least kept channel of any choice scores over the best pruned one, relatively."""
    scores = channel_scores(query, key, prompt_len, thinning).flatten(0, 1)
    return margin_of(scores, thinning.key_channels)


def margin_of(score: Tensor, count: int) -> float:
    """``selection_margin`` of scores [n, D], of which ``count`` are kept."""
    if count == score.shape[1]:
        return float("inf")
    best = score.topk(count + 1, dim=1).values
    return float((1 - best[:, -1] / best[:, -2]).min())


def kept_share(query: Tensor, key: Tensor, prompt_len: int, thinning: Thinning) -> Tensor:
    """Share of the scores' sum that kept channels have: float64 [S * Hk].

    The paper's score is a norm, of which ``channel_scores`` has the square.
    """
    score = channel_scores(query, key, prompt_len, thinning).sqrt().flatten(0, 1)
    return score.topk(thinning.key_channels, dim=1).values.sum(dim=1) / score.sum(dim=1)
