"""Static blocks in plain torch: what is stored, and attention over it in float64."""

from collections.abc import Sequence

import torch

from think_vllm.kernels.reference.attention import softmax_ref
from think_vllm.kernels.reference.quantization import quantize_fp8
from think_vllm.plan.static_plan import StaticPlan


def run_parts(
    kv_cache: torch.Tensor, block: int, head: int, plan: StaticPlan
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """View keys, values and scales of one run.

    Args:
        kv_cache: ``[num_blocks, Hk, N, C + V]``; in fp8 uint8 ``[num_blocks, Hk, N, C + V + 8]``.
        block: Number of the block.
        head: KV head.
        plan: How blocks are laid out.

    Returns:
        Keys ``[C, N]``, values ``[N, V]`` and, in fp8, float32 scales ``[2, N]``, those of keys
        first, else nothing; they share the cache's memory.
    """
    run = kv_cache[block, head].view(-1)
    first = plan.layout.keys_offset // kv_cache.itemsize
    end = first + plan.key_channels * plan.block_size
    values = run[:first].view(plan.block_size, plan.value_channels)
    keys = run[first:end].view(plan.key_channels, plan.block_size)
    return keys, values, run[end:].view(torch.float32).view(-1, plan.block_size)


def read_run(
    kv_cache: torch.Tensor, block: int, head: int, plan: StaticPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read keys ``[C, N]`` and values ``[N, V]`` of one run, float64."""
    keys, values, scales = run_parts(kv_cache, block, head, plan)
    if not plan.is_quantized:
        return keys.double(), values.double()
    of_keys, of_values = scales.double()
    keys, values = (codes.view(torch.float8_e4m3fn).double() for codes in (keys, values))
    return keys * of_keys, values * of_values[:, None]


def store_static_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slots: Sequence[int],
    kept_keys: Sequence[Sequence[int]],
    kept_values: Sequence[Sequence[int]],
    plan: StaticPlan,
) -> None:
    """Store the kept channels of tokens.

    Args:
        key: ``[tokens, Hk, D]``.
        value: ``[tokens, Hk, D]``.
        kv_cache: As for ``run_parts``. Written.
        slots: Per token, its block times ``N`` plus its place there; negative for none.
        kept_keys: Per KV head, its ``C`` key channels.
        kept_values: Per KV head, its ``V`` value channels.
        plan: How blocks are laid out.
    """
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        block, place = divmod(int(slot), plan.block_size)
        for head in range(kv_cache.shape[1]):
            keys, values, scales = run_parts(kv_cache, block, head, plan)
            stored_key = key[token, head, list(kept_keys[head])]
            stored_value = value[token, head, list(kept_values[head])]
            if plan.is_quantized:
                of_key, of_value = (quantize_fp8(x[None]) for x in (stored_key, stored_value))
                scales[:, place] = torch.stack([of_key.scales, of_value.scales])
                stored_key, stored_value = of_key.codes[0], of_value.codes[0]
            keys[:, place] = stored_key
            values[place] = stored_value


def static_attention_ref(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: Sequence[int],
    seq_len: Sequence[int],
    kept_keys: Sequence[Sequence[int]],
    kept_values: Sequence[Sequence[int]],
    plan: StaticPlan,
    scale: float,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with single query tokens to contexts of static blocks.

    Source: ThinK, arXiv 2407.21018, section 3.3, with channels that do not depend on the prompt.

    Args:
        query: ``[R, Hq, D]``.
        kv_cache: As for ``run_parts``.
        block_table: ``[num_requests, W]`` int32.
        request: ``[R]``. Row of the block table.
        seq_len: ``[R]``. Tokens that the query attends to; 0 for padding.
        kept_keys: Per KV head, its ``C`` key channels.
        kept_values: Per KV head, its ``V`` value channels.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]``. One more score per query head, not capped, whose weight goes to no value.

    Returns:
        ``[R, Hq, D]`` float64, zeros where ``seq_len`` is 0.
    """
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // kv_cache.shape[1]
    for row, (source, length) in enumerate(zip(request, seq_len, strict=True)):
        blocks = block_table[int(source), : -(-int(length) // plan.block_size)].tolist()
        for head in range(query.shape[1] if length else 0):
            of = head // group
            parts = [read_run(kv_cache, block, of, plan) for block in blocks]
            keys = torch.cat([keys for keys, _ in parts], dim=1)[:, : int(length)]
            values = torch.cat([values for _, values in parts])[: int(length)]
            scores = query[row, head, list(kept_keys[of])].double() @ keys * scale
            weights = softmax_ref(scores, logits_soft_cap, sinks, head)
            out[row, head, list(kept_values[of])] = weights @ values
    return out
