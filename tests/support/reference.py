"""The truth: a plain transformers model in float32 whose old keys and values are thinned.

Independent of the package's own code for scores, selection, spans and thin blocks: one causal
forward pass over prompt and completion, in which a query past the prompt sees the keys of thin
spans with their pruned channels set to zero, and keys and values as they come back from their
coding. Only the rules of a coding itself are the package's (``reference/quantization.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from think_vllm.formats import FORMATS, BlockFormat
from think_vllm.planner import BlockPlan
from think_vllm.reference.quantization import code_and_back


@dataclass(frozen=True)
class Thinning:
    """How thin old spans are, and when.

    Args:
        key_channels: Kept key channels of a head.
        span_tokens: Tokens of a span.
        recent_window: Most recent tokens that stay whole.
        observation_window: Last prompt queries that choose channels.
        prune_decode: Whether spans that fill while decoding become thin.
        format: How thin spans are coded.
        group: Elements that share a scale, for integer codings.
        thin_block_tokens: Tokens that are coded together; the last ones of a span may be fewer.
            None for a whole span.
    """

    key_channels: int
    span_tokens: int
    recent_window: int = 32
    observation_window: int = 32
    prune_decode: bool = True
    format: BlockFormat = FORMATS["none"]
    group: int = 32
    thin_block_tokens: int | None = None

    @classmethod
    def of(cls, plan: BlockPlan) -> Self:
        """What a server with this plan does."""
        return cls(
            key_channels=plan.key_channels,
            span_tokens=plan.span_blocks * plan.block_size,
            recent_window=plan.config.kv_recent_window,
            observation_window=plan.config.kv_observation_window,
            prune_decode=plan.config.kv_prune_decode,
            format=plan.config.format,
            group=plan.config.kv_quant_group,
            thin_block_tokens=plan.thin_block_tokens,
        )

    def thin_blocks(self, num_tokens: int) -> Iterator[slice]:
        """Tokens of each thin block of the full spans among ``num_tokens`` tokens."""
        size = self.thin_block_tokens or self.span_tokens
        for span in range(num_tokens // self.span_tokens):
            end = (span + 1) * self.span_tokens
            for first in range(span * self.span_tokens, end, size):
                yield slice(first, min(first + size, end))


def thin_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    prompt_len: int,
    thinning: Thinning | None,
) -> torch.Tensor:
    """Causal attention of one sequence.

    Args:
        query: [Hq, n, D].
        key: [Hk, n, D].
        value: [Hk, n, D].
        scaling: Factor on ``q . k``.
        prompt_len: Tokens of the prompt.
        thinning: None for dense attention.

    Returns:
        [Hq, n, D].
    """
    num_tokens, group = query.shape[1], query.shape[0] // key.shape[0]
    position = torch.arange(num_tokens)
    scores = query @ key.repeat_interleave(group, dim=0).transpose(1, 2)
    thin = torch.zeros(num_tokens, num_tokens, dtype=torch.bool)
    if thinning is not None:
        kept = kept_channels(query, key, prompt_len, thinning)
        thin_key, thin_value = _code(key, value, kept, thinning)
        end = position if thinning.prune_decode else torch.full_like(position, prompt_len)
        spans = (end - thinning.recent_window).clamp(min=0) // thinning.span_tokens
        thin_tokens = torch.where(position >= prompt_len, spans * thinning.span_tokens, 0)
        thin = position[None, :] < thin_tokens[:, None]
        thin_scores = query @ thin_key.repeat_interleave(group, dim=0).transpose(1, 2)
        scores = torch.where(thin, thin_scores, scores)
    scores = scores * scaling
    scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1)
    output = weights.masked_fill(thin, 0.0) @ value.repeat_interleave(group, dim=0)
    if thinning is not None:
        thin_weights = weights.masked_fill(~thin, 0.0)
        output = output + thin_weights @ thin_value.repeat_interleave(group, dim=0)
    return output


def kept_channels(
    query: torch.Tensor, key: torch.Tensor, prompt_len: int, thinning: Thinning
) -> torch.Tensor:
    """ThinK's choice: bool [Hk, D], true for kept channels."""
    group = query.shape[0] // key.shape[0]
    window = query[:, max(0, prompt_len - thinning.observation_window) : prompt_len].double()
    energy = window.square().mean(dim=1)  # [Hq, D]
    energy = energy.view(-1, group, energy.shape[-1]).mean(dim=1)  # [Hk, D]
    score = energy * key[:, :prompt_len].double().square().mean(dim=1)
    kept = torch.zeros_like(score, dtype=torch.bool)
    return kept.scatter_(1, score.topk(thinning.key_channels, dim=1).indices, True)


def _code(
    key: torch.Tensor, value: torch.Tensor, kept: torch.Tensor, thinning: Thinning
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as thin blocks hand them back, [Hk, n, D]; dense behind the last span."""
    thin_key, thin_value = key * kept[:, None, :], value.clone()
    codings = thinning.format
    if codings is FORMATS["none"]:
        return thin_key, thin_value
    for tokens in thinning.thin_blocks(key.shape[1]):
        for head in range(key.shape[0]):
            channels = kept[head].nonzero()[:, 0]
            matrix = key[head, tokens][:, channels].T.contiguous()
            read = code_and_back(matrix, codings.keys, thinning.group).float()
            thin_key[head, tokens.start : tokens.stop, channels] = read.T
            read = code_and_back(value[head, tokens], codings.values, thinning.group).float()
            thin_value[head, tokens] = read
    return thin_key, thin_value


_prompt_len = 0
_thinning: Thinning | None = None


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention in the form that transformers calls, of one sequence: query [1, Hq, n, D]."""
    output = thin_attention(query[0], key[0], value[0], scaling, _prompt_len, _thinning)
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("think_reference", _attention)


class Reference:
    """A plain transformers model that scores completions."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="think_reference"
        ).eval()

    @torch.no_grad()
    def logits(
        self, prompt: list[int], completion: list[int], thinning: Thinning | None
    ) -> torch.Tensor:
        """What the model says behind every token but the last.

        Args:
            prompt: Token ids.
            completion: Token ids.
            thinning: None for the model as it is.

        Returns:
            [len(prompt) + len(completion) - 1, vocabulary] float32. Row ``len(prompt) - 1`` is
            about the first token of the completion.
        """
        global _prompt_len, _thinning
        _prompt_len, _thinning = len(prompt), thinning
        try:
            logits = self._model(torch.tensor([prompt + completion[:-1]]), use_cache=False).logits
        finally:
            _prompt_len, _thinning = 0, None
        found: torch.Tensor = logits[0].float()
        return found

    def scores(
        self, prompt: list[int], completion: list[int], thinning: Thinning | None
    ) -> torch.Tensor:
        """``logits`` as log-probabilities."""
        return torch.log_softmax(self.logits(prompt, completion, thinning), dim=-1)

    def logprobs(
        self, prompt: list[int], completion: list[int], thinning: Thinning | None
    ) -> list[float]:
        """Log-probability of each completion token, given all tokens before it.

        Args:
            prompt: Token ids.
            completion: Token ids.
            thinning: None for the model as it is.
        """
        scores = self.scores(prompt, completion, thinning)[len(prompt) - 1 :]
        picked: list[float] = scores[
            torch.arange(len(completion)), torch.tensor(completion)
        ].tolist()
        return picked
