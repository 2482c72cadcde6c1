"""The truth: a plain transformers model in float32 whose old keys and values are thinned.

Independent of the package's own code for scores, selection, spans and thin blocks: one causal
forward pass over prompt and completion, in which a query past the prompt sees the keys and values
of thin spans with their pruned channels set to zero, and as they come back from their encoding. The
rules of an encoding itself are the package's (``kernels/reference/quantization.py``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.support.channels import (
    kept_channels,
    kept_share,
    kept_value_channels,
    margin_of,
    selection_margin,
    value_scores,
)
from tests.support.eviction_reference import best_tokens, token_margin, token_scores
from think_vllm.kernels.reference.quantization import code_and_back
from think_vllm.plan.formats import FORMATS, BlockFormat
from think_vllm.plan.planner import BlockPlan


@dataclass(frozen=True)
class Thinning:
    """How thin old spans are, and when; names and units are those of a plan and its settings.

    ``thin_block_tokens`` are quantized together, the last ones of a span may be fewer; None is a
    whole span. ``kept_tokens`` are old tokens that each head keeps at most, if it ``evict``s.
    """

    key_channels: int
    span_tokens: int
    recent_window: int = 32
    observation_window: int = 32
    prune_decode: bool = True
    format: BlockFormat = FORMATS["none"]
    group: int = 32
    thin_block_tokens: int | None = None
    value_channels: int | None = None
    evict: str | None = None
    kept_tokens: int = 0
    select: str = "think"
    tables: str = "prompt"

    @classmethod
    def of(cls, plan: BlockPlan) -> Self:
        """What a server with this plan does."""
        return cls(
            key_channels=plan.key_channels,
            span_tokens=plan.span_blocks * plan.block_size,
            recent_window=plan.config.kv_recent_window,
            observation_window=plan.config.kv_observation_window,
            # Nothing happens to decoded tokens of a plan that only evicts.
            prune_decode=plan.config.kv_prune_decode and plan.thin_blocks < plan.span_blocks,
            evict=plan.config.kv_evict if plan.config.evicts else None,
            kept_tokens=plan.config.kv_evict_budget // plan.span_tokens * plan.span_tokens,
            format=plan.config.format,
            group=plan.config.kv_quant_group,
            thin_block_tokens=plan.thin_block_tokens,
            value_channels=plan.value_channels if plan.prunes_values else None,
            select=plan.config.kv_select,
            tables=plan.config.kv_channel_tables,
        )

    def old_tokens(self, prompt_len: int) -> int:
        """Tokens of a prompt that its end makes thin."""
        return max(0, prompt_len - self.recent_window) // self.span_tokens * self.span_tokens

    def evicts(self, prompt_len: int) -> bool:
        """Whether a prompt has more old tokens than are kept."""
        return self.evict is not None and self.old_tokens(prompt_len) > self.kept_tokens

    def thin_blocks(self, num_tokens: int) -> Iterator[slice]:
        """Tokens of each thin block of the full spans among ``num_tokens`` tokens."""
        size = self.thin_block_tokens or self.span_tokens
        for span in range(num_tokens // self.span_tokens):
            end = (span + 1) * self.span_tokens
            for first in range(span * self.span_tokens, end, size):
                yield slice(first, min(first + size, end))


def thin_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    prompt_len: int,
    thinning: Thinning | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, [heads, n, D], of a sequence that begins with a prompt.

    Without a thinning it is dense. A query sees the ``window`` most recent tokens, its own
    included. Scores become ``softcap * tanh(score / softcap)``. ``sinks`` are one more score per
    head, [Hq], whose weight goes to no token.
    """
    num_tokens, group = query.shape[1], query.shape[0] // key.shape[0]
    position = torch.arange(num_tokens)
    thin_tokens = torch.zeros_like(position)
    if thinning is not None:
        end = position if thinning.prune_decode else torch.full_like(position, prompt_len)
        spans = (end - thinning.recent_window).clamp(min=0) // thinning.span_tokens
        thin_tokens = torch.where(position >= prompt_len, spans * thinning.span_tokens, 0)
    heads = [x.repeat_interleave(group, dim=0) for x in (key, value)]
    # Queries that see nothing thin come first, and are most: torch's own attention is fast there.
    dense = num_tokens if thinning is None else int((thin_tokens == 0).sum())
    if window is not None or softcap is not None or sinks is not None:
        dense = 0
    output = torch.nn.functional.scaled_dot_product_attention(
        query[None, :, :dense], *(x[None, :, :dense] for x in heads), is_causal=True, scale=scaling
    )[0]
    if dense == num_tokens:
        return output
    thin = position[None, :] < thin_tokens[dense:, None]
    scores = query[:, dense:] @ heads[0].transpose(1, 2)
    thin_heads = heads
    hidden = (position[None, :] > position[dense:, None])[None]
    if thinning is not None:
        tokens = kept_tokens(query, key, scaling, prompt_len, thinning, softcap, sinks)
        kept = kept_channels(query, key, prompt_len, thinning, tokens)
        # What the prompt's last queries were answered: they see nothing thin.
        answers = output[:, :prompt_len]
        if answers.shape[1] < prompt_len:
            seen = [x[:, :prompt_len] for x in (query, key, value)]
            answers = thin_attention(*seen, scaling, prompt_len, None, window, softcap, sinks)
        kept_values = kept_value_channels(answers, key.shape[0], thinning)
        thin_pair = _code(key, value, kept, kept_values, thinning, tokens)
        thin_heads = [x.repeat_interleave(group, dim=0) for x in thin_pair]
        evicted = ~tokens.repeat_interleave(group, dim=0)[:, None, :]
        hidden = hidden | (evicted & (position[dense:, None] >= prompt_len)[None])
        scores = torch.where(thin, query[:, dense:] @ thin_heads[0].transpose(1, 2), scores)
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if window is not None:
        hidden |= position[None, :] <= position[dense:, None] - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :num_tokens]
    rest = weights.masked_fill(thin, 0.0) @ heads[1]
    rest = rest + weights.masked_fill(~thin, 0.0) @ thin_heads[1]
    return torch.cat([output, rest], dim=1)


def kept_tokens(
    query: Tensor,
    key: Tensor,
    scaling: float,
    prompt_len: int,
    thinning: Thinning,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Tokens that are not evicted: bool [Hk, n]."""
    kept = torch.ones(key.shape[:2], dtype=torch.bool)
    if thinning.evict is None or not thinning.evicts(prompt_len):
        return kept
    old = thinning.old_tokens(prompt_len)
    parts = query[:, :prompt_len], key[:, :prompt_len], scaling, thinning.evict
    scores = token_scores(*parts, thinning.observation_window, old, softcap, sinks)
    _margins.append(token_margin(scores, thinning.kept_tokens))
    kept[:, :old] = best_tokens(scores, thinning.kept_tokens)
    return kept


def _code(
    key: Tensor,
    value: Tensor,
    kept: Tensor,
    kept_values: Tensor,
    thinning: Thinning,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values as thin blocks hand them back, [Hk, n, D]; dense behind the last span.

    The ``tokens`` that a head keeps are quantized as if there had been no others.
    """
    thin_key, thin_value = key * kept, value * kept_values[:, None, :]
    encodings = thinning.format
    if encodings is FORMATS["none"]:
        return thin_key, thin_value
    for head in range(key.shape[0]):
        held = tokens[head].nonzero()[:, 0]
        for part in thinning.thin_blocks(len(held)):
            rows = held[part]
            channels = kept[head, rows[0]].nonzero()[:, 0]
            matrix = key[head, rows][:, channels].T.contiguous()
            read = code_and_back(
                matrix, encodings.keys, thinning.group, has_zero_points=True
            ).float()
            thin_key[head, rows[:, None], channels] = read.T
            of_values = kept_values[head].nonzero()[:, 0]
            matrix = value[head, rows][:, of_values].contiguous()
            read = code_and_back(matrix, encodings.values, thinning.group).float()
            thin_value[head, rows[:, None], of_values] = read
    return thin_key, thin_value


_prompt_len = 0
_thinning: Thinning | None = None
_margins: list[float] = []
_shares: list[Tensor] = []


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls, of one sequence: query [1, Hq, n, D].

    Layers with a sliding window are never thinned.
    """
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:  # also in families whose plain models know of no windows
        is_window = kinds[module.layer_idx] == "sliding_attention"
        sliding_window = module.config.sliding_window if is_window else None
    thinning = _thinning if sliding_window is None else None
    output = thin_attention(
        query[0], key[0], value[0], scaling, _prompt_len, thinning, sliding_window, softcap, s_aux
    )
    if thinning is not None:
        _margins.append(selection_margin(query[0], key[0], _prompt_len, thinning))
        _shares.append(kept_share(query[0], key[0], _prompt_len, thinning))
        if thinning.value_channels is not None:
            score = value_scores(output[:, :_prompt_len], key.shape[1], thinning)
            _margins.append(margin_of(score, thinning.value_channels))
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("think_reference", _attention)


class Reference:
    """A plain transformers model that scores completions.

    ``margin`` is the least ``selection_margin`` of the layers in the last call. Where it is as
    small as float32 rounds, another order of the same sums may keep another channel. ``shares`` has
    its ``kept_share`` of every layer that was thinned: float64 [layers, S * Hk].
    """

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32) -> None:
        self.margin = float("inf")
        self.shares = torch.zeros(0, 0, dtype=torch.float64)
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="think_reference"
        ).eval()

    @torch.no_grad()
    def logits(self, prompt: list[int], completion: list[int], thinning: Thinning | None) -> Tensor:
        """What the model says behind all tokens but the last: [tokens - 1, vocabulary].

        Row ``len(prompt) - 1`` is about the first token of the completion.
        """
        global _prompt_len, _thinning
        _prompt_len, _thinning = len(prompt), thinning
        _margins.clear()
        _shares.clear()
        try:
            logits = self._model(torch.tensor([prompt + completion[:-1]]), use_cache=False).logits
        finally:
            _prompt_len, _thinning = 0, None
        self.margin = min(_margins, default=float("inf"))
        if _shares:
            self.shares = torch.stack(_shares)
        return logits[0]

    def scores(self, prompt: list[int], completion: list[int], thinning: Thinning | None) -> Tensor:
        """``logits`` as log-probabilities."""
        return torch.log_softmax(self.logits(prompt, completion, thinning), dim=-1)

    def logprobs(
        self, prompt: list[int], completion: list[int], thinning: Thinning | None
    ) -> list[float]:
        """Log-probability of each completion token, given all tokens before it."""
        scores = self.scores(prompt, completion, thinning)[len(prompt) - 1 :]
        return scores[torch.arange(len(completion)), torch.tensor(completion)].tolist()
