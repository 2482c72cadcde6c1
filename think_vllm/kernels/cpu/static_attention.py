"""Attention over static blocks, in the kernel of thin ones.

To that kernel a static block is a thin block without tables, a span by itself, whose last one need
not be full. What tables would say is the same for all blocks of a layer, so queries are gathered
before it and outputs scattered behind it, once for a call instead of once for a span.
"""

import numpy as np
import numpy.typing as npt
import torch

from think_vllm.kernels.checks import check_block_table
from think_vllm.kernels.cpu.attend import attend
from think_vllm.kernels.cpu.blocks import (
    BlockShape,
    Cache,
    Fp8Columns,
    Fp8Rows,
    Matrix,
    PlainMatrix,
)
from think_vllm.kernels.cpu.checks import check_query
from think_vllm.kernels.cpu.decode import SPLIT_TOKENS, flat_sinks
from think_vllm.kernels.cpu.elements import flat_elements, flat_indices
from think_vllm.kernels.cpu.splits import Inputs, Sizes
from think_vllm.kernels.cpu.static_store import gather_channels
from think_vllm.kernels.cpu.threads import choose_threads
from think_vllm.kernels.cpu.vectors import LANES
from think_vllm.kernels.static_cache import StaticChannels, check_static_cache
from think_vllm.plan.matrix_layout import align_up
from think_vllm.plan.static_plan import StaticPlan


def static_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: npt.NDArray[np.int32],
    seq_len: npt.NDArray[np.int32],
    channels: StaticChannels,
    plan: StaticPlan,
    scale: float,
    out: torch.Tensor,
    logits_soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend with single query tokens to contexts of static blocks.

    Source: ThinK, arXiv 2407.21018, section 3.3, with channels that do not depend on the prompt.

    Args:
        query: ``[R, Hq, D]`` bf16, fp16 or fp32.
        kv_cache: As for ``store_static``.
        block_table: ``[num_requests, W]`` int32.
        request: ``[R]`` int32. Row of the block table that a query belongs to.
        seq_len: ``[R]`` int32. Tokens it attends to, its own included; 0 for padding.
        channels: Of the layer.
        plan: How blocks are laid out.
        scale: Factor on ``q . k``.
        out: ``[R, Hq, D]`` in the dtype of ``query``. Written in full, zeros where seq_len is 0.
        logits_soft_cap: If positive, scores become ``cap * tanh(score / cap)``.
        sinks: ``[Hq]`` float. One more score per query head, without a value; None for none.

    Raises:
        ValueError: If shapes or dtypes do not fit each other.

    Notes:
        All sums are float32; the weights of the softmax are not rounded.
    """
    who = "static_attention"
    check_static_cache(who, kv_cache, query.dtype, plan)
    check_query(who, query, kv_cache.shape[1], plan.head_size)
    if out.dtype != query.dtype or out.shape != query.shape:
        raise ValueError(
            f"{who}: query is {query.dtype} {tuple(query.shape)}, out {out.dtype} "
            f"{tuple(out.shape)}; expected one dtype and one shape"
        )
    check_block_table(who, block_table)
    rows, num_heads, _ = query.shape
    if request.shape != (rows,) or seq_len.shape != (rows,):
        raise ValueError(
            f"{who}: request has shape {request.shape}, seq_len {seq_len.shape}, query has {rows} "
            "rows"
        )
    width = align_up(max(plan.key_channels, plan.value_channels), LANES)
    gathered, answer = query, out
    group = num_heads // kv_cache.shape[1]
    if plan.prunes_keys:
        gathered = query.new_zeros(rows, num_heads, width)
        per_head = channels.keys.repeat_interleave(group, dim=0)
        gathered[..., : plan.key_channels] = gather_channels(query, per_head)
    if plan.prunes_values or out.stride()[1:] != (plan.head_size, 1):
        answer = out.new_empty(rows, num_heads, width)
    lengths = flat_indices(seq_len)
    attend(
        choose_threads(2 * int(lengths.sum()) * num_heads * width),
        Inputs(
            query=flat_elements(gathered),
            block_table=flat_elements(block_table),
            request=flat_indices(request),
            seq_len=lengths,
            thin_spans=-(-lengths // np.int32(plan.block_size)),
            sinks=flat_sinks(who, sinks, num_heads),
        ),
        np.float32(scale),
        np.float32(logits_soft_cap),
        flat_elements(answer),
        *_view(kv_cache, query.dtype, block_table, plan, width),
        _sizes(gathered, answer, group, plan),
    )
    if plan.prunes_values:
        out.zero_()
        per_head = channels.values.repeat_interleave(group, dim=0)
        index = per_head.expand(rows, *per_head.shape)
        out.scatter_(2, index, answer[..., : plan.value_channels])
    elif answer is not out:
        out.copy_(answer)


def _view(
    kv_cache: torch.Tensor,
    dtype: torch.dtype,
    block_table: torch.Tensor,
    plan: StaticPlan,
    width: int,
) -> tuple[Cache, BlockShape, Matrix, Matrix]:
    """What the kernel is given of the blocks; see ``blocks.Blocks``.

    Its head size is that of what it reads and writes: gathered queries and kept values.
    """
    layout = plan.layout
    as_bytes = flat_elements(kv_cache).view(np.uint8)
    elements = as_bytes.view(flat_elements(torch.empty(0, dtype=dtype)).dtype)
    cache = Cache(elements, as_bytes, as_bytes.view(np.int16), as_bytes.view(np.float32))
    shape = BlockShape(
        kv_heads=kv_cache.shape[1],
        head_size=width,
        table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0) * kv_cache.itemsize // plan.itemsize,
        run_stride=layout.run_bytes // plan.itemsize,
        itemsize=plan.itemsize,
        block_size=plan.block_size,
        span_blocks=1,
        thin_blocks=1,
        thin_tokens=plan.block_size,
        key_channels=plan.key_channels,
        value_channels=width,
        kept_channels=plan.key_channels,
        channels_offset=-1,
        value_channels_offset=-1,
    )
    if plan.is_quantized:
        keys = Fp8Columns(layout.keys_offset, plan.block_size, layout.key_scales_offset // 4)
        return cache, shape, keys, Fp8Rows(0, plan.value_channels, layout.value_scales_offset // 4)
    plain = PlainMatrix(layout.keys_offset // plan.itemsize, plan.block_size)
    return cache, shape, plain, PlainMatrix(0, plan.value_channels)


def _sizes(query: torch.Tensor, out: torch.Tensor, group: int, plan: StaticPlan) -> Sizes:
    blocks = max(1, SPLIT_TOKENS // plan.block_size)
    return Sizes(
        group=group,
        query_stride=query.stride(0),
        out_stride=out.stride(0),
        thin_split_blocks=blocks,
        dense_split_blocks=1,
        split_columns=blocks * plan.block_size,
    )
