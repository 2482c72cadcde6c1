"""The truth about requests whose prefix came thin from the cache, or was pruned chunk by chunk.

Like ``reference.py``, one causal forward pass of a plain transformers model in float32; but every
token has the channels that its span kept, and every query says how many tokens it sees thin.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from tests.support.channels import kept_channels, kept_value_channels
from tests.support.reference import Thinning
from tests.support.served import Completion

#: Per layer, the channels that each token's key and value keep once it is thin: bool [2, Hk, n, D].
Kept = list[Tensor]


@dataclass
class View:
    """What a request's queries see; spans are pruned without encoding.

    ``cached`` is the view of the request that left a prefix in the cache, if one was hit: thin
    spans, and dense blocks behind them. With pruning at chunk ends, chunks of the prompt begin at
    ``chunk_starts``. ``kept`` is filled in once the request is scored.
    """

    thinning: Thinning
    prompt_len: int
    num_tokens: int
    cached: "View | None" = None
    cached_spans: int = 0
    cached_tokens: int = 0
    chunk_starts: Sequence[int] = (0,)
    kept: Kept = field(default_factory=list)

    def spans(self, position: int) -> int:
        recent, span = self.thinning.recent_window, self.thinning.span_tokens
        return max(self.cached_spans, max(0, position - recent) // span)

    def thin_tokens(self) -> Tensor:
        """Tokens that each query sees thin: int64 [n]."""
        thin = torch.zeros(self.num_tokens, dtype=torch.int64)
        for start, end in pairwise([*self.chunk_starts, self.prompt_len]):
            own = self.spans(start) if len(self.chunk_starts) > 1 else self.cached_spans
            thin[start:end] = own
        for position in range(self.prompt_len, self.num_tokens):
            thin[position] = self.spans(position)
        thin *= self.thinning.span_tokens
        if self.cached is not None:
            # These were computed by the request that left them.
            thin[: self.cached_tokens] = self.cached.thin_tokens()[: self.cached_tokens]
        return thin

    def choose(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, layer: int
    ) -> Tensor:
        """Channels of one layer: bool [2, Hk, n, D]."""
        span, heads = self.thinning.span_tokens, key.shape[0]
        kept = torch.ones(2, heads, self.num_tokens, key.shape[2], dtype=torch.bool)
        first = self.cached_spans
        if self.cached is not None:
            kept[:, :, : first * span] = self.cached.kept[layer][:, :, : first * span]
        answers, thin = torch.zeros_like(query), self.thin_tokens()
        for start, end in pairwise([*self.chunk_starts, self.prompt_len]):
            if self.thinning.value_channels is not None:
                seen = attend(query, key, value, kept, thin, scaling)
                answers[:, start:end] = seen[:, start:end]
            last = self.spans(end)
            if last > first or end == self.prompt_len:
                # Scored by the chunk's last queries over the keys that are dense by then. What is
                # decoded keeps the channels of the span before it.
                begin = max(0 if end == self.prompt_len else start, first * span)
                observed = min(self.thinning.observation_window, end - begin)
                window = replace(self.thinning, observation_window=observed)
                chosen = kept_channels(
                    query[:, first * span :], key[:, first * span :], end - first * span, window
                )
                values = kept_value_channels(answers[:, :end], heads, window)
                if last > first or (end == self.prompt_len and last == self.cached_spans):
                    kept[0, :, first * span :] = chosen
                    kept[1, :, first * span :] = values[:, None]
                first = last
        return kept


def attend(
    query: Tensor, key: Tensor, value: Tensor, kept: Tensor, thin_tokens: Tensor, scaling: float
) -> Tensor:
    """Causal attention [Hq, n, D] in which each query sees so many tokens thin."""
    group = query.shape[0] // key.shape[0]
    position = torch.arange(query.shape[1])
    thin = position[None, :] < thin_tokens[:, None]
    dense = [x.repeat_interleave(group, 0) for x in (key, value)]
    pruned = [(x * k).repeat_interleave(group, 0) for x, k in zip((key, value), kept, strict=True)]
    scores = torch.where(thin, query @ pruned[0].transpose(1, 2), query @ dense[0].transpose(1, 2))
    scores = scores * scaling
    scores = scores.masked_fill(position[None, :] > position[:, None], float("-inf"))
    weights = scores.softmax(-1)
    seen_thin = weights.masked_fill(~thin, 0.0) @ pruned[1]
    return weights.masked_fill(thin, 0.0) @ dense[1] + seen_thin


_view: View | None = None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention in the form that transformers calls, of one sequence: query [1, Hq, n, D]."""
    assert _view is not None
    query, key, value = query[0], key[0], value[0]
    kept = _view.choose(query, key, value, scaling, module.layer_idx)
    _view.kept.append(kept)
    output = attend(query, key, value, kept, _view.thin_tokens(), scaling)
    return output.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register("think_prefix_reference", _attention)


class PrefixReference:
    """A plain transformers model that scores completions under a view."""

    def __init__(self, model: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="think_prefix_reference"
        ).eval()

    @torch.no_grad()
    def logprobs(self, prompt: list[int], completion: list[int], view: View) -> list[float]:
        """Log-probability of each completion token under the view of a request of this length."""
        global _view
        _view = view
        view.kept.clear()
        try:
            logits = self._model(torch.tensor([prompt + completion[:-1]]), use_cache=False).logits
        finally:
            _view = None
        scores = torch.log_softmax(logits[0, len(prompt) - 1 :].float(), dim=-1)
        return scores[torch.arange(len(completion)), torch.tensor(completion)].tolist()


def worst(
    reference: PrefixReference, prompt: list[int], completion: Completion, view: View
) -> float:
    """Largest difference of a log-probability from the reference."""
    expected = reference.logprobs(prompt, completion.tokens, view)
    return max(abs(a - b) for a, b in zip(expected, completion.logprobs, strict=True))


def view_of(prompt: list[int], completion: Completion, thinning: Thinning, **hit: Any) -> View:
    """The view of a request that is done."""
    return View(thinning, len(prompt), len(prompt) + len(completion.tokens) - 1, **hit)
