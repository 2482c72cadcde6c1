"""The truth: a plain transformers model in float32 whose keys are masked after the prompt.

Independent of the package's own code for scores, selection and thin blocks: one causal forward
pass over prompt and completion, in which a query past the prompt sees the keys of thin spans
with their pruned channels set to zero.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM


@dataclass(frozen=True)
class Pruning:
    """How much is pruned, and when.

    Args:
        key_channels: Kept key channels of a head.
        span_tokens: Tokens of a span.
        recent_window: Most recent tokens that stay whole.
        observation_window: Last prompt queries that choose channels.
        prune_decode: Whether spans that fill while decoding are pruned.
    """

    key_channels: int
    span_tokens: int
    recent_window: int = 32
    observation_window: int = 32
    prune_decode: bool = True


_prompt_len = 0
_pruning: Pruning | None = None


def _masked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one sequence: query [1, Hq, n, D], key and value [1, Hk, n, D]."""
    num_tokens, group = query.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(num_tokens)
    key_all = key.repeat_interleave(group, dim=1)
    scores = query @ key_all.transpose(2, 3)
    if _pruning is not None:
        kept = _kept_channels(query[0], key[0], group, _pruning).repeat_interleave(group, dim=0)
        thin_scores = (query * kept[None, :, None, :]) @ key_all.transpose(2, 3)
        end = position if _pruning.prune_decode else torch.full_like(position, _prompt_len)
        spans = (end - _pruning.recent_window).clamp(min=0) // _pruning.span_tokens
        thin_tokens = torch.where(position >= _prompt_len, spans * _pruning.span_tokens, 0)
        thin = position[None, :] < thin_tokens[:, None]
        scores = torch.where(thin, thin_scores, scores)
    scores = scores * scaling
    scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
    output = torch.softmax(scores, dim=-1) @ value.repeat_interleave(group, dim=1)
    return output.transpose(1, 2).contiguous(), None


def _kept_channels(
    query: torch.Tensor, key: torch.Tensor, group: int, pruning: Pruning
) -> torch.Tensor:
    """ThinK's choice: 1.0 for kept channels, float32 [Hk, D]."""
    window = query[:, max(0, _prompt_len - pruning.observation_window) : _prompt_len].double()
    energy = window.square().mean(dim=1)  # [Hq, D]
    energy = energy.view(-1, group, energy.shape[-1]).mean(dim=1)  # [Hk, D]
    score = energy * key[:, :_prompt_len].double().square().mean(dim=1)
    kept = torch.zeros_like(score)
    kept.scatter_(1, score.topk(pruning.key_channels, dim=1).indices, 1.0)
    return kept.float()


AttentionInterface.register("think_reference", _masked_attention)


class Reference:
    """A plain transformers model that scores completions."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="think_reference"
        ).eval()

    @torch.no_grad()
    def logprobs(
        self, prompt: list[int], completion: list[int], pruning: Pruning | None
    ) -> list[float]:
        """Log-probability of each completion token, given all tokens before it.

        Args:
            prompt: Token ids.
            completion: Token ids.
            pruning: None for the unpruned model.
        """
        global _prompt_len, _pruning
        _prompt_len, _pruning = len(prompt), pruning
        try:
            logits = self._model(torch.tensor([prompt + completion[:-1]]), use_cache=False).logits
        finally:
            _prompt_len, _pruning = 0, None
        scores = torch.log_softmax(logits[0, len(prompt) - 1 :].float(), dim=-1)
        picked: list[float] = scores[
            torch.arange(len(completion)), torch.tensor(completion)
        ].tolist()
        return picked
