"""Select the old tokens of a prompt that each KV head keeps, and repack them.

Plain torch, for CPUs and GPUs alike: it runs once at the end of a prompt (h2o: once a chunk), not
while decoding. ``reference/eviction.py`` says what is right, and cites the papers. Knows blocks,
not vLLM.

A prompt that keeps fewer tokens than it has is repacked in its last old spans; see ``spans.py``.
"""

import torch

from think_vllm.kernels.reference.eviction import POOLING_TOKENS
from think_vllm.plan.layout import BlockForm, DenseLayout
from think_vllm.plan.planner import BlockPlan

#: Scores that are held at once, of one KV head: what stays in a core's cache. GPUs want fewer,
#: larger pieces: 64 MiB of float32.
TILE_SCORES, GPU_TILE_SCORES = 1 << 19, 1 << 24


def split_runs(
    kv_cache: torch.Tensor, plan: BlockPlan, form: BlockForm
) -> tuple[torch.Tensor, torch.Tensor]:
    """View a cache as dense keys ``[num_blocks, Hk, D, N]`` and values ``[num_blocks, Hk, N, D]``.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        plan: How blocks are laid out.
        form: Of dense blocks.
    """
    size, head_size, start = plan.block_size, plan.head_size, kv_cache.storage_offset()
    layout = DenseLayout(head_size, size, kv_cache.itemsize, form)
    blocks, strides = kv_cache.shape[:2], kv_cache.stride()[:2]
    (of_token, of_channel), of_value = layout.key_strides, layout.value_strides
    first = start + layout.values_offset // kv_cache.itemsize
    return (
        kv_cache.as_strided((*blocks, head_size, size), (*strides, of_channel, of_token), start),
        kv_cache.as_strided((*blocks, size, head_size), (*strides, *of_value), first),
    )


def add_attention(
    sums: torch.Tensor,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    first: int,
    plan: BlockPlan,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    form: BlockForm = BlockForm.CPU,
) -> None:
    """Add the attention that a prompt's tokens get from some of its queries.

    Args:
        sums: ``[Hk, P]`` float32. Gains per query the mean over the query heads of a KV head.
        query: ``[n, Hq, D]``. Of the tokens ``first .. first + n - 1``.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``. Holds the keys up to the last query's own.
        blocks: int64 ``[ceil((first + n) / N)]``. Dense blocks of the prompt's tokens.
        first: Position of the first query.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]``. One more score per query head, whose weight goes to no token.
        form: Of dense blocks.

    Notes:
        Float32. Nothing waits for a device.
    """
    count, num_heads, head_size = query.shape
    num_kv_heads = sums.shape[0]
    group, seen = num_heads // num_kv_heads, first + count
    keys, _ = split_runs(kv_cache, plan, form)
    position = torch.arange(seen, device=query.device)
    held = TILE_SCORES if query.device.type == "cpu" else GPU_TILE_SCORES
    tile = max(1, held // (group * seen))
    for head in range(num_kv_heads):
        selected = slice(head * group, (head + 1) * group)
        key = keys[blocks, head].transpose(0, 1).reshape(head_size, -1).float()
        for begin in range(0, count, tile):
            end = min(begin + tile, count)
            last = first + end  # no query of the tile sees what lies behind
            queries = query[begin:end, selected].reshape(-1, head_size).float()
            scores = (queries @ key[:, :last]).mul_(scale)
            if logits_soft_cap > 0:
                scores.div_(logits_soft_cap).tanh_().mul_(logits_soft_cap)
            scores = scores.view(end - begin, group, last)
            hidden = position[None, :last] > position[first + begin : last, None]
            scores.masked_fill_(hidden[:, None], -torch.inf)
            if sinks is not None:
                column = sinks[selected].float().view(1, group, 1).expand(end - begin, group, 1)
                scores = torch.cat([scores, column], dim=2)
            weights = torch.softmax(scores, dim=2)[:, :, :last]
            sums[head, :last] += weights.sum(dim=(0, 1)) / group


def pool(sums: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Average ``[Hk, P]`` over neighbours among the first ``num_tokens``: ``[Hk, num_tokens]``."""
    return torch.nn.functional.avg_pool1d(
        sums[None, :, :num_tokens], POOLING_TOKENS, stride=1, padding=POOLING_TOKENS // 2
    )[0]


def select_tokens(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Keep each head's tokens with the highest scores.

    Args:
        scores: ``[Hk, n]``.
        count: How many are kept.

    Returns:
        ``[Hk, count]`` int64, ascending; of equal scores the earlier token is kept.

    Raises:
        ValueError: If there are not as many.
    """
    if not 0 < count <= scores.shape[1]:
        raise ValueError(f"select_tokens: count is {count}; expected 1 to {scores.shape[1]}")
    ranked = torch.argsort(scores, dim=1, descending=True, stable=True)
    return ranked[:, :count].sort(dim=1).values


def gather_tokens(
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    tokens: torch.Tensor,
    plan: BlockPlan,
    form: BlockForm = BlockForm.CPU,
) -> torch.Tensor:
    """Copy each head's tokens into dense blocks of their own.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``.
        blocks: int64 ``[n]``. Dense blocks of the prompt's old tokens.
        tokens: int64 ``[Hk, count]``, ``count`` a multiple of ``N``.
        plan: How blocks are laid out.
        form: Of dense blocks.

    Returns:
        ``[count / N, Hk, N, 2 * D]``, in the dense form of the cache.
    """
    num_heads, count = tokens.shape
    size = plan.block_size
    block, slot = blocks[tokens // size], tokens % size
    head = torch.arange(num_heads, device=tokens.device)[:, None]
    keys, values = split_runs(kv_cache, plan, form)
    repacked = kv_cache.new_empty(count // size, num_heads, size, 2 * plan.head_size)
    packed_keys, packed_values = split_runs(repacked, plan, form)
    shape = (num_heads, count // size, size, plan.head_size)
    packed_keys.copy_(keys[block, head, :, slot].view(shape).permute(1, 0, 3, 2))
    packed_values.copy_(values[block, head, slot].view(shape).transpose(0, 1))
    return repacked


def table_of_entries(block_table: torch.Tensor) -> torch.Tensor:
    """View a block table as one whose rows begin at every entry: ``[entries, 1]``.

    Kernels do not look where a row ends, so a context can begin anywhere in its row.
    """
    rows, width = block_table.shape
    entries = (rows - 1) * block_table.stride(0) + width
    return block_table.as_strided((entries, 1), (1, 1))
