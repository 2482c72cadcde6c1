"""Exact match of recall answers in plain transformers: a second opinion on what is served.

All policies; ``bench/quality_tables.py`` asks engines. After the prompt without its last token,
everything older than the recent window is coded and decoded by the package's reference rules, keys
per channel in groups of tokens and values per token in groups of channels; then pruned key channels
are set to zero. Unlike the server, no span stays dense for want of tokens, and what was decoded is
rounded to the model's dtype.
"""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from bench.exact_match import Setting, table_row
from models.recipe.evaluate import (
    WINDOW_TOKENS,
    Prefilled,
    greedy_answer,
    load,
    prefill,
    prune_keys,
)
from think_vllm.kernels.reference.quantization import code_and_back
from think_vllm.plan.formats import FORMATS, BlockFormat
from think_vllm.tools.eval.recall import RecallSample

SIMULATED_FORMATS = ("none", "kivi4", "k4v2")


def simulated_rows(
    model_path: Path,
    dtype: str,
    samples: Sequence[RecallSample],
    settings: Sequence[Setting],
    group: int,
) -> Iterator[str]:
    """Measure all settings together, prompt by prompt; then yield their rows.

    Args:
        model_path: Directory of the recall model.
        dtype: Name of the model's dtype.
        samples: Prompts.
        settings: What to measure.
        group: Tokens of a key channel, and channels of a value, that share a scale.
    """
    model, tokenizer = load(model_path, getattr(torch, dtype))
    generator = torch.Generator()
    formats = {setting.format for setting in settings}
    right: dict[Setting, list[bool]] = {setting: [] for setting in settings}
    thin_tokens = []
    for index, sample in enumerate(samples):
        state = prefill(model, tokenizer(sample.prompt, return_tensors="pt")["input_ids"])
        thin_tokens.append(state.cache.get_seq_length() - WINDOW_TOKENS)
        coded = {name: coded_cache(state, FORMATS[name], group) for name in formats}
        for setting in settings:
            cache = copy.deepcopy(coded[setting.format])
            # All formats and ratios of a prompt share one random ranking.
            generator.manual_seed(index)
            prune_keys(cache, state, setting.policy, setting.ratio, generator)
            ids = greedy_answer(model, cache, state.next_token)
            right[setting].append(sample.is_answered_by(str(tokenizer.decode(ids))))
    for setting in settings:
        yield table_row(setting, samples, thin_tokens, right[setting])


@torch.inference_mode()
def coded_cache(state: Prefilled, format_: BlockFormat, group: int) -> DynamicCache:
    """Copy the cache of a prompt; code all but its recent window, and read it again."""
    cache = copy.deepcopy(state.cache)
    layer: Any  # transformers does not type the tensors of a layer
    for layer in cache.layers:
        for head in range(layer.keys.shape[1]):
            old_keys = layer.keys[0, head, :-WINDOW_TOKENS]  # [tokens, D]
            old_keys.copy_(code_and_back(old_keys.T, format_.keys, group, has_zeros=True).T)
            old_values = layer.values[0, head, :-WINDOW_TOKENS]
            old_values.copy_(code_and_back(old_values, format_.values, group))
    return cache
