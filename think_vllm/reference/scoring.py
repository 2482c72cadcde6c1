"""ThinK's channel scores and choice, in plain torch and float64.

Source: ThinK, arXiv 2407.21018, section 3.2: channel ``i`` of a head scores
``||Q_obs[:, i] K[:, i]^T||_F = ||Q_obs[:, i]|| * ||K[:, i]||``. The square, a mean instead of a
sum, and the mean over the query heads of a group (kvpress's form for grouped-query attention)
leave the order unchanged for one query head per KV head.
"""

from collections.abc import Sequence

import torch

from think_vllm.planner import BlockPlan
from think_vllm.reference.compaction import dense_tokens


def key_energy_ref(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    prompt_len: Sequence[int],
    plan: BlockPlan,
    first_block: Sequence[int] | None = None,
) -> torch.Tensor:
    """Mean of each channel's squared keys over the dense blocks of a prompt.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]``. Row of the block table.
        prompt_len: ``[n]``. Tokens of the prompt.
        plan: How blocks are laid out.
        first_block: ``[n]``. First dense block; those before it are left out. None for 0.

    Returns:
        ``[n, Hk, D]`` float64.
    """
    energies = []
    firsts = [0] * len(request) if first_block is None else first_block
    for row, length, first in zip(request, prompt_len, firsts, strict=True):
        count = -(-int(length) // plan.block_size)
        blocks = block_table[int(row), int(first) : count].tolist()
        keys, _ = dense_tokens(kv_cache, blocks, int(length) - int(first) * plan.block_size)
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


def select_channels_ref(
    query_energy: torch.Tensor, key_energy: torch.Tensor, key_channels: int
) -> torch.Tensor:
    """Keep the channels with the highest product of energies.

    Args:
        query_energy: ``[n, Hk, D]``.
        key_energy: ``[n, Hk, D]``.
        key_channels: ``C``, how many are kept.

    Returns:
        ``[n, Hk, C]`` uint8, ascending; of equal scores the lower channel is kept.
    """
    score = query_energy * key_energy
    kept = torch.empty(*score.shape[:2], key_channels, dtype=torch.uint8)
    for n in range(score.shape[0]):
        for head in range(score.shape[1]):
            ranked = sorted(range(score.shape[2]), key=lambda i: (-float(score[n, head, i]), i))
            kept[n, head] = torch.tensor(sorted(ranked[:key_channels]), dtype=torch.uint8)
    return kept
