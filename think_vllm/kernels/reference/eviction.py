"""Which old tokens of a prompt each KV head keeps, in plain torch and float64.

Sources: SnapKV, arXiv 2404.14469, section 4 (attention of the prompt's last queries, pooled along
the prompt); H2O, arXiv 2306.14048, section 4 (attention of all queries, accumulated). Differs:
tokens are selected per KV head, by the mean over the query heads that share it, as kvpress does;
pooling is an average (SnapKV's code offers that and the maximum).
"""

import torch

from think_vllm.kernels.reference.attention import softmax_ref
from think_vllm.kernels.reference.compaction import dense_tokens, split_dense
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan

#: Neighbours along the prompt over which SnapKV averages its scores: its authors' setting for
#: LongBench.
POOLING_TOKENS = 7


def attention_sums_ref(
    query: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that each token gets from some queries of its sequence, added up.

    Args:
        query: ``[n, Hq, D]``. Of the tokens ``first .. first + n - 1``.
        keys: ``[Hk, L, D]`` with ``L >= first + n``. Of the sequence.
        first: Position of the first query; one sees the keys up to its own position.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]``. One more score per query head, whose weight goes to no token.

    Returns:
        ``[Hk, L]`` float64: sums over queries, means over the query heads of a KV head.
    """
    num_kv_heads, length, _ = keys.shape
    group = query.shape[1] // num_kv_heads
    sums = torch.zeros(num_kv_heads, length, dtype=torch.float64)
    for index in range(query.shape[0]):
        seen = first + index + 1
        for head in range(query.shape[1]):
            scores = keys[head // group, :seen].double() @ query[index, head].double() * scale
            weights = softmax_ref(scores, logits_soft_cap, sinks, head)
            sums[head // group, :seen] += weights / group
    return sums


def pool_ref(sums: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Average ``[Hk, L]`` over ``POOLING_TOKENS`` neighbours among the first ``num_tokens``.

    What lies outside counts as zero, as in SnapKV's code.
    """
    pooled = torch.zeros(sums.shape[0], num_tokens, dtype=torch.float64)
    reach = POOLING_TOKENS // 2
    for token in range(num_tokens):
        around = sums[:, max(0, token - reach) : min(num_tokens, token + reach + 1)]
        pooled[:, token] = around.sum(dim=1) / POOLING_TOKENS
    return pooled


def select_tokens_ref(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Keep each head's tokens with the highest scores.

    Args:
        scores: ``[Hk, n]``.
        count: How many are kept.

    Returns:
        ``[Hk, count]`` int64, ascending; of equal scores the earlier token is kept.
    """
    kept = []
    for row in scores.tolist():
        ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))
        kept.append(sorted(ranked[:count]))
    return torch.tensor(kept)


def gather_tokens_ref(
    kv_cache: torch.Tensor,
    blocks: list[int],
    tokens: torch.Tensor,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> torch.Tensor:
    """Copy each head's tokens into dense blocks of their own.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        blocks: Dense blocks of the prompt's old tokens.
        tokens: ``[Hk, count]`` int64, ``count`` a multiple of ``N``.
        plan: How blocks are laid out.
        form: Of dense blocks.

    Returns:
        ``[count / N, Hk, N, 2 * D]``, in the dense form of the cache.
    """
    num_heads, block_size, width = kv_cache.shape[1:]
    keys, values = dense_tokens(kv_cache, blocks, len(blocks) * block_size, form)
    packed = kv_cache.new_zeros(tokens.shape[1] // block_size, num_heads, block_size, width)
    packed_keys, packed_values = split_dense(packed, form)
    for head in range(num_heads):
        for place, token in enumerate(tokens[head].tolist()):
            block, slot = divmod(place, block_size)
            packed_keys[block, head, slot] = keys[head, token]
            packed_values[block, head, slot] = values[head, token]
    return packed
