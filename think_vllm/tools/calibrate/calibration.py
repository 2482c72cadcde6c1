"""Rank the channels of a model over prompts, with the model as transformers computes it.

Source: ThinK, arXiv 2407.21018, section 3.2: a key channel scores the norm of its queries times the
norm of its keys. The paper scores each prompt by itself; here squares of the scores are averaged
over prompts, each weighed alike whatever its length. With grouped queries the mean runs over the
heads of the group as well. A value channel scores the energy of what attention answers in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from think_vllm.errors import ThinkError
from think_vllm.plan.channel_tables import Channels, ModelShape

#: Name of the attention that observes, in transformers' registry.
_OBSERVER = "think_vllm_calibration"

_running: ChannelScores | None = None


class ChannelScores:
    """Scores of all channels of a model, averaged over prompts.

    Args:
        shape: Of the model.
        observed_queries: Last queries of a prompt that count; None for all.
    """

    def __init__(self, shape: ModelShape, observed_queries: int | None = None) -> None:
        self._observed = observed_queries
        self._prompts = 0
        size = (shape.num_layers, shape.num_kv_heads, shape.head_size)
        self.keys = torch.zeros(size, dtype=torch.float64)
        self.values = torch.zeros(size, dtype=torch.float64)

    def add(self, layer: int, query: torch.Tensor, key: torch.Tensor, answer: torch.Tensor) -> None:
        """Add one layer of one prompt.

        Args:
            layer: Its number.
            query: [Hq, n, D], position encoding applied.
            key: [Hk, n, D], as ``query``.
            answer: [Hq, n, D]. What attention answers.
        """
        first = 0 if self._observed is None else max(0, query.shape[1] - self._observed)
        num_kv_heads = key.shape[0]
        of_queries = _energy(query[:, first:], num_kv_heads)
        self.keys[layer] += (of_queries * _energy(key, num_kv_heads)).cpu()
        self.values[layer] += _energy(answer[:, first:], num_kv_heads).cpu()

    def rankings(self) -> tuple[list[list[Channels]], list[list[Channels]]]:
        """Key and value channels from the best to the worst; of equal ones the lower comes first.

        Raises:
            ThinkError: If a score is no number.
        """
        for scores in (self.keys, self.values):
            if not torch.isfinite(scores).all():
                raise ThinkError(
                    "calibrate: the model computes keys, queries or outputs that are not finite; "
                    "try --dtype float32"
                )
        keys, values = (
            torch.argsort(scores, dim=-1, descending=True, stable=True).tolist()
            for scores in (self.keys, self.values)
        )
        return keys, values


def score_prompts(
    model: str,
    shape: ModelShape,
    prompts: Iterable[Sequence[int]],
    dtype: str = "auto",
    observed_queries: int | None = None,
    trust_remote_code: bool = False,
) -> ChannelScores:
    """Run a model over prompts and score its channels.

    Args:
        model: Name or directory.
        shape: What vLLM makes of it.
        prompts: Token ids.
        dtype: Of the model, as in torch; "auto" for its own.
        observed_queries: Last queries of a prompt that count; None for all.
        trust_remote_code: As in transformers.

    Raises:
        ThinkError: If transformers cannot load the model, or computes attention in another way.
    """
    global _running
    device = "cuda" if torch.cuda.is_available() else "cpu"
    AttentionInterface.register(_OBSERVER, _attend)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=_OBSERVER,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split()) or repr(error)
        raise ThinkError(f"calibrate: transformers cannot load {model!r}: {reason}") from None
    loaded = loaded.eval().to(device)
    scores = ChannelScores(shape, observed_queries)
    _running = scores
    try:
        with torch.no_grad():
            for tokens in prompts:
                loaded(
                    torch.tensor([list(tokens)], device=device), use_cache=False, logits_to_keep=1
                )
    finally:
        _running = None
    seen = scores.keys.flatten(1).any(dim=1)
    if not seen.all():
        missing = (~seen).nonzero()[:, 0].tolist()
        raise ThinkError(
            f"calibrate: no queries and keys were seen in layers {missing} of {model!r}; its "
            "attention in transformers is of its own kind, so its tables cannot be made here"
        )
    return scores


def hash_prompts(prompts: Sequence[Sequence[int]]) -> str:
    """SHA-256 of token ids, to tell calibrations apart."""
    text = "\n".join(" ".join(map(str, tokens)) for tokens in prompts)
    return hashlib.sha256(text.encode()).hexdigest()


def _energy(part: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Mean square of each channel over tokens, and over the heads of a group: float64 [Hk, D]."""
    squares = part.double().square().mean(dim=1)
    return squares.view(num_kv_heads, -1, squares.shape[-1]).mean(dim=1)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of one sequence in the form that transformers calls, watched.

    Raises:
        ThinkError: If the layer attends in a way that this does not know.
    """
    if sliding_window is not None or softcap is not None or s_aux is not None:
        raise ThinkError(
            "calibrate: an attention layer has a sliding window, a soft-cap or sinks, which "
            "--kv-select static does not know; use --kv-select think"
        )
    answer = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    assert _running is not None  # score_prompts
    _running.add(module.layer_idx, query[0], key[0], answer[0])
    return answer.transpose(1, 2).contiguous(), None
