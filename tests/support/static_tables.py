"""Channel tables for tests, and their truth: a transformers model whose keys are masked."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from think_vllm.kernels.reference.quantization import code_and_back
from think_vllm.plan.channel_tables import Calibration, ChannelTables, ModelShape
from think_vllm.plan.formats import Encoding

_running: "MaskedModel | None" = None


def random_tables(model: Path, seed: int = 0) -> ChannelTables:
    """Rankings at random, so that every layer and head has its own."""
    config = AutoConfig.from_pretrained(model)
    shape = ModelShape(
        model_type=config.model_type,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
    )
    rng = random.Random(seed)

    def draw() -> list[list[list[int]]]:
        every = range(shape.head_size)
        return [
            [rng.sample(every, shape.head_size) for _ in range(shape.num_kv_heads)]
            for _ in range(shape.num_layers)
        ]

    made = Calibration(
        source="random", prompts=1, tokens=1, sha256="", observed_queries=None, think_vllm="test"
    )
    return ChannelTables(
        model=str(model), shape=shape, calibration=made, key_channels=draw(), value_channels=draw()
    )


def mask(rankings: list[list[list[int]]], count: int) -> Tensor:
    """Which channels are kept if ``count`` are: bool [layers, Hk, D]."""
    ranked = torch.tensor(rankings)
    kept = torch.zeros(ranked.shape, dtype=torch.bool)
    return kept.scatter_(2, ranked[..., :count], True)


class MaskedModel:
    """A plain transformers model in float32 that keeps keys and values where masks are true.

    Masks are bool [layers, Hk, D]. If ``quantized``, each token's keys, and its values, come back
    from fp8 of their own.
    """

    def __init__(self, model: Path, keys: Tensor, values: Tensor, quantized: bool = False) -> None:
        self.masks, self.quantized = (keys, values), quantized
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="static_reference"
        ).eval()

    @torch.no_grad()
    def logprobs(self, prompt: list[int], completion: list[int]) -> Tensor:
        """Log-probability of each completion token, given all tokens before it."""
        global _running
        _running = self
        try:
            tokens = torch.tensor([prompt + completion[:-1]])
            logits = self._model(tokens, use_cache=False).logits[0, len(prompt) - 1 :]
        finally:
            _running = None
        scores: Tensor = torch.log_softmax(logits, dim=-1)
        return scores[torch.arange(len(completion)), torch.tensor(completion)]


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention of one sequence in the form that transformers calls."""
    assert _running is not None
    kept_keys, kept_values = (kept[module.layer_idx][None, :, None, :] for kept in _running.masks)
    key, value = key * kept_keys, value * kept_values
    if _running.quantized:
        key, value = _code(key), _code(value)
    output = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def _code(part: Tensor) -> Tensor:
    """Every row as it comes back from fp8; zeros of pruned channels change no scale."""
    rows = part.reshape(-1, 1, part.shape[-1])
    return torch.stack([code_and_back(row, Encoding.FP8, 32) for row in rows]).float().view_as(part)


AttentionInterface.register("static_reference", _attention)
