"""Presses of kvpress, as they are and held to what a plan of ours prunes and keeps.

As they are: ThinKPress prunes ``int(D * ratio)`` channels of all tokens, SnapKVPress has its
default window of 64 queries and averages over 5 tokens, and keeps as many as the plan. Held to a
plan: as many channels of the same tokens, the same window, the same averages, and the same tokens
left alone at the end. What they choose is theirs in both.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from kvpress import ComposedPress, SnapKVPress, ThinKPress
from transformers import PreTrainedModel

from think_vllm.kernels.reference.eviction import POOLING_TOKENS

#: Of both windows and both kinds of choice, in every plan that is compared.
WINDOW_TOKENS = 32
HEAD_SIZE = 128
AS_IT_IS, SAME_TOKENS = "as it is", "same tokens"
KINDS = (AS_IT_IS, SAME_TOKENS)


@dataclass
class PartThinKPress(ThinKPress):
    """ThinKPress that leaves some tokens of the cache as they are.

    Args:
        left_alone: First and end of these, as they stand in the cache.
    """

    left_alone: tuple[int, int] = (0, 0)

    def compress(self, module: Any, hidden_states: Any, keys: torch.Tensor, *rest: Any) -> Any:
        """Prune, then put back what is left alone."""
        tokens = slice(*self.left_alone)
        whole = keys[:, :, tokens].clone()
        keys, values = super().compress(module, hidden_states, keys, *rest)
        keys[:, :, tokens] = whole
        return keys, values


@dataclass
class OldSnapKVPress(SnapKVPress):
    """SnapKVPress that evicts old tokens only.

    Args:
        old_tokens: Of the prompt; all others are kept, and come first in the cache.
    """

    old_tokens: int = 0

    def score(self, *args: Any) -> torch.Tensor:
        """Score, and let nothing that is not old be evicted."""
        scores = super().score(*args)
        scores[:, :, self.old_tokens :] = scores.max()  # what the press gives to its window
        return scores


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Args:
        kind: One of `KINDS`; anything without a plan.
        ratio: Of key channels.
        budget: Of old tokens; None for all.
        plan: ``Row.plan`` of ours with the same ratio and budget; empty to compress nothing.
    """

    kind: str
    ratio: float
    budget: int | None
    plan: dict[str, Any]

    def press(self, model: PreTrainedModel, prompt_tokens: int) -> AbstractContextManager[Any]:
        """A context in which a prompt's cache is compressed."""
        if not self.plan:
            return nullcontext()
        old = self._old_tokens(prompt_tokens)
        tail = prompt_tokens - old
        kept = tail + (old if self.budget is None else min(old, self.plan["kept_tokens"]))
        presses: list[Any] = []
        if kept < prompt_tokens:
            # The press rounds down to `kept`.
            evicted = (prompt_tokens - kept - 0.5) / prompt_tokens
            if self.kind == AS_IT_IS:
                presses.append(SnapKVPress(evicted))
            else:
                presses.append(OldSnapKVPress(evicted, WINDOW_TOKENS, POOLING_TOKENS, old))
        if self.ratio and self.kind == AS_IT_IS:
            presses.append(ThinKPress(self.ratio, WINDOW_TOKENS))
        elif self.ratio:
            pruned = (HEAD_SIZE - self.plan["key_channels"] + 0.5) / HEAD_SIZE
            left_alone = (0, tail) if presses else (old, prompt_tokens)
            presses.append(PartThinKPress(pruned, WINDOW_TOKENS, left_alone))
        if not presses:
            return nullcontext()
        press = presses[0] if len(presses) == 1 else ComposedPress(presses)
        return press(model)

    def _old_tokens(self, prompt_tokens: int) -> int:
        """Tokens of the prompt's full spans before the recent window."""
        old = max(0, prompt_tokens - self.plan["recent_window"])
        return old // int(self.plan["span_tokens"]) * int(self.plan["span_tokens"])
