"""Measure the recall model: ``python -m models.recipe.evaluate --model models/tiny-recall``.

Prints two Markdown tables: exact match of plain generation, and exact match when key channels are
masked after the prompt. The second is a plain transformers picture of what pruned channels do to
answers: nothing is saved, channels are only set to zero, so it owes nothing to this package.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from think_vllm.tools.eval.recall import ANSWER_TOKENS, CODE_DIGITS, RecallSample, recall_samples

from .init import HEAD_DIM

SIZES = ((512, 32), (1024, 64), (2048, 96))
"""Tokens and records of the evaluated prompts."""
POLICIES = ("think", "key-norm", "random")
PRUNE_RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WINDOW_TOKENS = 32
"""Most recent tokens: their queries score the channels, and their keys stay whole."""


@dataclass(frozen=True)
class Prefilled:
    """State after a prompt without its last token.

    Attributes:
        cache: Keys and values of the prompt, post-RoPE.
        queries: Per layer [Hq, W, D]: post-RoPE queries of the last `WINDOW_TOKENS` tokens.
        next_token: [1, 1] int64. The last token of the prompt.
    """

    cache: DynamicCache
    queries: tuple[torch.Tensor, ...]
    next_token: torch.Tensor


@contextmanager
def _recorded_queries(model: LlamaForCausalLM) -> Iterator[list[torch.Tensor]]:
    """Collect the output of every q_proj, [1, N, Hq * D] each, in layer order."""
    outputs: list[torch.Tensor] = []

    def record(_module: object, _inputs: object, output: torch.Tensor) -> None:
        outputs.append(output)

    hooks = [layer.self_attn.q_proj.register_forward_hook(record) for layer in model.model.layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def prefill(model: LlamaForCausalLM, prompt_ids: torch.Tensor) -> Prefilled:
    """Process a prompt up to its last token, so that every answer digit sees the pruned cache.

    Args:
        model: The recall model.
        prompt_ids: [1, N] int64, N > `WINDOW_TOKENS`.
    """
    body = prompt_ids[:, :-1]
    cache = DynamicCache(config=model.config)
    with _recorded_queries(model) as raw:
        model(body, past_key_values=cache, use_cache=True)
    positions = torch.arange(body.shape[1])[None]
    cos, sin = model.model.rotary_emb(raw[0], positions)
    queries = []
    for layer_queries in raw:
        heads = layer_queries.view(1, body.shape[1], -1, HEAD_DIM).transpose(1, 2)
        rotated, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
        queries.append(rotated[0, :, -WINDOW_TOKENS:])
    return Prefilled(cache, tuple(queries), prompt_ids[:, -1:])


def channel_scores(
    policy: str, queries: torch.Tensor, keys: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Score key channels; the lowest scores are pruned.

    Source: ThinK, arXiv 2407.21018, for ``think``: the squared Frobenius norm of the product of a
    query channel and a key channel. With grouped queries, the query side is averaged over a group.

    Args:
        policy: ``think``, ``key-norm`` (the key side alone) or ``random``.
        queries: [Hq, W, D]. Recent queries, post-RoPE.
        keys: [Hk, N, D]. Keys of the prompt, post-RoPE.
        generator: Used by ``random`` only.

    Returns:
        [Hk, D] float32.

    Raises:
        ValueError: If the policy is unknown.
    """
    key_energy = keys.float().square().mean(1)
    match policy:
        case "think":
            query_energy = queries.float().square().mean(1)
            group_energy = query_energy.view(keys.shape[0], -1, keys.shape[2]).mean(1)
            return group_energy * key_energy
        case "key-norm":
            return key_energy
        case "random":
            return torch.rand(key_energy.shape, generator=generator)
        case _:
            raise ValueError(f"policy: expected one of {POLICIES}, got {policy!r}")


@torch.inference_mode()
def prune_keys(
    cache: DynamicCache,
    state: Prefilled,
    policy: str,
    prune_ratio: float,
    generator: torch.Generator,
) -> None:
    """Zero key channels of `cache`.

    Args:
        cache: A copy of the cache of `state`, perhaps with its entries changed. Written.
        state: Its queries and keys choose the channels. Left unchanged.
        policy: As for `channel_scores`.
        prune_ratio: Share of channels that is zeroed, per layer and KV head, 0 to 1 (rounded
            down to whole channels). The last `WINDOW_TOKENS` tokens keep all of theirs.
        generator: As for `channel_scores`.
    """
    for layer, whole, queries in zip(cache.layers, state.cache.layers, state.queries, strict=True):
        keys = cast(torch.Tensor, cast(DynamicLayer, layer).keys)  # [1, Hk, N, D]
        num_pruned = int(prune_ratio * keys.shape[-1])
        scoring_keys = cast(torch.Tensor, cast(DynamicLayer, whole).keys)[0]
        scores = channel_scores(policy, queries, scoring_keys, generator)
        pruned = scores.topk(num_pruned, dim=-1, largest=False).indices  # [Hk, num_pruned]
        kept = torch.ones_like(scores).scatter_(-1, pruned, 0.0)
        keys[:, :, :-WINDOW_TOKENS] *= kept[None, :, None, :].to(keys.dtype)


@torch.inference_mode()
def greedy_answer(
    model: LlamaForCausalLM, cache: DynamicCache, next_token: torch.Tensor
) -> list[int]:
    """Decode an answer greedily.

    Args:
        model: The model that filled `cache`.
        cache: The prompt without its last token. Grows.
        next_token: [1, 1] int64. The last token of the prompt.

    Returns:
        The ids of `CODE_DIGITS` tokens.
    """
    token, answer = next_token, []
    for _ in range(CODE_DIGITS):
        logits = model(token, past_key_values=cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        answer.append(int(token))
    return answer


def exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[RecallSample],
) -> float:
    """Return the share of samples answered right by ``generate``, greedy, one at a time."""
    hits = 0
    for sample in samples:
        prompt_ids = tokenizer(sample.prompt, return_tensors="pt")["input_ids"]
        output = cast(Any, model).generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
        )
        completion = tokenizer.decode(output[0, prompt_ids.shape[1] :])
        hits += sample.is_answered_by(cast(str, completion))
    return hits / len(samples)


def pruned_exact_match(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[RecallSample],
) -> dict[tuple[str, float], float]:
    """Return exact match per (policy, pruned ratio); ``("dense", 0.0)`` is the whole cache."""
    cells = [("dense", 0.0), *((policy, ratio) for policy in POLICIES for ratio in PRUNE_RATIOS)]
    hits = dict.fromkeys(cells, 0)
    generator = torch.Generator().manual_seed(0)
    for sample in samples:
        state = prefill(model, tokenizer(sample.prompt, return_tensors="pt")["input_ids"])
        for policy, ratio in cells:
            # A ratio of 0 prunes nothing, whichever policy scores.
            scorer = "think" if policy == "dense" else policy
            cache = copy.deepcopy(state.cache)
            prune_keys(cache, state, scorer, ratio, generator)
            ids = greedy_answer(model, cache, state.next_token)
            hits[policy, ratio] += sample.is_answered_by(cast(str, tokenizer.decode(ids)))
    return {cell: count / len(samples) for cell, count in hits.items()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(directory: Path, dtype: torch.dtype) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load model and tokenizer from a directory, without a network."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model.eval()
    return cast(LlamaForCausalLM, model), cast(PreTrainedTokenizerFast, tokenizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Evaluate the bundled recall model.")
    parser.add_argument("--model", type=Path, default=Path("models/tiny-recall"))
    parser.add_argument("--samples", type=int, default=40, help="prompts per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    samples = {size: list(recall_samples(args.seed, args.samples, *size)) for size in SIZES}
    names = {size: f"{size[0]} / {size[1]}" for size in SIZES}

    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{args.samples} prompts per cell, seed {args.seed}\n"
    )
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        model, tokenizer = load(args.model, dtype)
        scores = [f"{exact_match(model, tokenizer, samples[size]):.2f}" for size in SIZES]
        rows.append([str(dtype).removeprefix("torch."), *scores])
    print(markdown_table(["tokens / records", *names.values()], rows), flush=True)

    # The loop ended with float32: the choice of channels is then free of rounding.
    rows = []
    for size in SIZES:
        cells = pruned_exact_match(model, tokenizer, samples[size])
        dense = f"{cells['dense', 0.0]:.2f}"
        for policy in POLICIES:
            scores = [f"{cells[policy, ratio]:.2f}" for ratio in PRUNE_RATIOS]
            rows.append([names[size], policy, dense, *scores])
    header = ["tokens / records", "policy", "dense", *(f"{ratio:.1f}" for ratio in PRUNE_RATIOS)]
    print("\n" + markdown_table(header, rows))


if __name__ == "__main__":
    main()
