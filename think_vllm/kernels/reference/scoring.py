"""Scores of channels, ThinK's and others, and the choice, in plain torch and float64.

Source: ThinK, arXiv 2407.21018, section 3.2: channel ``i`` of a head scores
``||Q_obs[:, i] K[:, i]^T||_F = ||Q_obs[:, i]|| * ||K[:, i]||``. The square, a mean instead of a
sum, and the mean over the query heads of a group (kvpress's form for grouped-query attention)
leave the order unchanged for one query head per KV head.

The paper outlines the same for values, and its authors' code has none of it. The score here is
what channel ``i`` adds to the outputs of the observed queries,
``||softmax(Q_obs K^T) V[:, i]||_F``, again squared, averaged, and averaged over a group. A query's
row of that product is its attention output, which the forward pass has made anyway. So value
channels are scored by ``query_energy_ref`` of the outputs in place of the queries, and none forms
the weights a second time; ``value_energy_ref`` is the long way. What a prompt saw pruned, behind a
thin prefix, is missing from its outputs, and so from its scores.
"""

import random
from collections.abc import Sequence

import torch

from think_vllm.kernels.reference.attention import softmax_ref
from think_vllm.kernels.reference.compaction import dense_tokens
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan


def key_energy_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    prompt_len: Sequence[int],
    plan: BlockPlan,
    first_block: Sequence[int] | None = None,
    form: BlockForm = BlockForm.CPU,
) -> torch.Tensor:
    """Mean of each channel's squared keys over the dense blocks of a prompt.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]``. Row of the block table.
        prompt_len: ``[n]``. Tokens of the prompt.
        plan: How blocks are laid out.
        first_block: ``[n]``. First dense block; those before it are left out. None for 0.
        form: Of dense blocks.

    Returns:
        ``[n, Hk, D]`` float64.
    """
    energies = []
    firsts = [0] * len(request) if first_block is None else first_block
    for row, length, first in zip(request, prompt_len, firsts, strict=True):
        count = -(-int(length) // plan.block_size)
        blocks = block_table[int(row), int(first) : count].tolist()
        dense = int(length) - int(first) * plan.block_size
        keys, _ = dense_tokens(kv_cache, blocks, dense, form)
        energies.append(keys.double().square().mean(dim=1))
    return torch.stack(energies)


def query_energy_ref(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Mean of each channel's squared queries over tokens and the heads of a group.

    Args:
        query: ``[tokens, Hq, D]``.
        num_kv_heads: ``Hk``.

    Returns:
        ``[Hk, D]`` float64.
    """
    squares = query.double().square().mean(dim=0)
    return squares.view(num_kv_heads, -1, query.shape[2]).mean(dim=1)


def key_scores_ref(
    select: str,
    query_energy: torch.Tensor,
    key_energy: torch.Tensor,
    layer: int = 0,
    first_head: int = 0,
    seed: int = 0,
) -> torch.Tensor:
    """Score key channels as ``--kv-select`` says.

    Args:
        select: ``think``: norm of queries times norm of keys; ``key-norm``: norm of keys;
            ``random``: numbers that seed, layer and head alone decide.
        query_energy: ``[n, Hk, D]``.
        key_energy: ``[n, Hk, D]``.
        layer: Number of the layer in the model.
        first_head: Number of the first of the ``Hk`` heads in the model.
        seed: vLLM's ``--seed``.

    Returns:
        ``[n, Hk, D]``.

    Raises:
        KeyError: For any other ``select``.
    """
    drawn = torch.zeros_like(key_energy)
    for head in range(drawn.shape[1]):
        generator = random.Random(f"{seed} {layer} {first_head + head} keys")
        for channel in range(drawn.shape[2]):
            drawn[:, head, channel] = generator.random()
    return {"think": query_energy * key_energy, "key-norm": key_energy, "random": drawn}[select]


def value_energy_ref(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean square of what each value channel adds to the outputs of a context's last queries.

    Args:
        query: ``[tokens, Hq, D]``. The last ones of the context.
        keys: ``[Hk, S, D]``. All of it.
        values: ``[Hk, S, D]``.
        scale: Factor on ``q . k``.
        logits_soft_cap: As for ``decode_attention_ref``, and so for ``sinks``.
        sinks: ``[Hq]``.

    Returns:
        ``[Hk, D]`` float64.
    """
    num_tokens, num_heads, head_size = query.shape
    num_kv_heads, length = keys.shape[:2]
    group = num_heads // num_kv_heads
    energy = torch.zeros(num_kv_heads, head_size, dtype=torch.float64)
    for head in range(num_heads):
        kv_head = head // group
        for token in range(num_tokens):
            seen = length - num_tokens + token + 1
            scores = keys[kv_head, :seen].double() @ query[token, head].double() * scale
            weights = softmax_ref(scores, logits_soft_cap, sinks, head)
            energy[kv_head] += (weights @ values[kv_head, :seen].double()).square()
    return energy / (num_tokens * group)


def top_channels_ref(score: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the channels with the highest scores.

    Args:
        score: ``[n, Hk, D]``.
        count: How many are kept.

    Returns:
        ``[n, Hk, count]`` uint8, ascending; of equal scores the lower channel is kept.
    """
    kept = torch.empty(*score.shape[:2], count, dtype=torch.uint8)
    for n in range(score.shape[0]):
        for head in range(score.shape[1]):
            ranked = sorted(range(score.shape[2]), key=lambda i: (-float(score[n, head, i]), i))
            kept[n, head] = torch.tensor(sorted(ranked[:count]), dtype=torch.uint8)
    return kept
