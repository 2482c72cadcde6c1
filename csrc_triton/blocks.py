"""Blocks as kernels see them: compile-time sizes and byte offsets, run-time strides."""

from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.launch import STRIDE_MULTIPLE
from think_vllm.plan.layout import ThinLayout
from think_vllm.plan.planner import BlockPlan

#: Compile-time numbers of a plan, in the order in which kernels take them:
#: D head size, N tokens of a dense block, SPAN and THIN blocks of a span before and after,
#: T tokens of a thin block, C kept key channels; KEY_BITS and VALUE_BITS of a code (0: elements of
#: the cache's dtype, 8: e4m3), GROUP elements per scale; then byte offsets from the start of a run
#: (``*_ROW``: bytes of a row of codes; TABLE is -1 if no key channel was pruned); V kept value
#: channels, and where their table is, -1 if none was pruned.
LAYOUT_NAMES = (
    "D", "N", "SPAN", "THIN", "T", "C", "KEY_BITS", "VALUE_BITS", "GROUP",
    "KEY_ROW", "KEY_SCALES", "KEY_ZEROS", "VALUES", "VALUE_ROW", "VALUE_SCALES", "TABLE", "V",
    "VALUE_TABLE",
)  # fmt: skip


def layout_constants(plan: BlockPlan) -> dict[str, int]:
    """The numbers of ``LAYOUT_NAMES``, to be passed to a kernel as keywords."""
    layout: ThinLayout = plan.layout
    keys, values = layout.keys, layout.values
    numbers = (
        plan.head_size, plan.block_size, plan.span_blocks, plan.thin_blocks,
        plan.thin_block_tokens, plan.key_channels, keys.encoding.value, values.encoding.value,
        plan.config.kv_quant_group,
        keys.row_bytes, keys.scales_offset, keys.zero_points_offset,
        values.offset, values.row_bytes, values.scales_offset,
        layout.table_offset if layout.has_table else -1,
        plan.value_channels, layout.value_table_offset if layout.has_value_table else -1,
    )  # fmt: skip
    return dict(zip(LAYOUT_NAMES, numbers, strict=True))


def check_blocks(who: str, kv_cache: torch.Tensor, plan: BlockPlan) -> None:
    """Check a cache against a plan. Arguments and errors as for ``check_cache``."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if kv_cache.dim() != 4 or kv_cache.dtype not in dtypes:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; expected bfloat16, "
            "float16 or float32 [num_blocks, Hk, N, 2 * D]"
        )
    width = 2 * plan.head_size
    if kv_cache.shape[2:] != (plan.block_size, width) or kv_cache.itemsize != plan.itemsize:
        raise ValueError(
            f"{who}: kv_cache is {kv_cache.dtype} {tuple(kv_cache.shape)}; the plan is for blocks "
            f"of [{plan.block_size}, {width}] elements of {plan.itemsize} bytes"
        )
    if kv_cache.stride()[1:] != (plan.block_size * width, width, 1):
        raise ValueError(
            f"{who}: kv_cache has strides {kv_cache.stride()}; dims 1 to 3 must be contiguous"
        )


def check_cache(
    who: str, kv_cache: torch.Tensor, block_table: torch.Tensor, plan: BlockPlan
) -> None:
    """Check a cache and a block table against a plan.

    Args:
        who: The launcher, named in messages.
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        plan: How blocks are laid out.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    check_blocks(who, kv_cache, plan)
    if block_table.dtype != torch.int32 or block_table.dim() != 2 or block_table.stride(1) != 1:
        raise ValueError(
            f"{who}: block_table is {block_table.dtype} {tuple(block_table.shape)} with strides "
            f"{block_table.stride()}; expected int32 [num_requests, W], rows contiguous"
        )
    if kv_cache.device != block_table.device:
        raise ValueError(
            f"{who}: kv_cache is on {kv_cache.device}, block_table on {block_table.device}"
        )


def cache_strides(who: str, kv_cache: torch.Tensor) -> dict[str, int]:
    """Run-time distances between blocks, and between the KV heads of a block.

    In units of 16 bytes (``launch.whole_stride``): head sizes and block sizes are multiples of 16.

    Raises:
        ValueError: If blocks lie otherwise.
    """
    size = kv_cache.itemsize
    if kv_cache.stride(0) * size % STRIDE_MULTIPLE:
        raise ValueError(
            f"{who}: kv_cache has blocks {kv_cache.stride(0) * size} bytes apart; kernels need a "
            f"multiple of {STRIDE_MULTIPLE}"
        )
    return {
        "block_stride": kv_cache.stride(0) * size // STRIDE_MULTIPLE,
        "head_stride": kv_cache.stride(1) * size // STRIDE_MULTIPLE,
    }


def cache_bytes(kv_cache: torch.Tensor) -> torch.Tensor:
    """The cache's memory as uint8, what every kernel takes as ``kv_ptr``."""
    return torch.as_strided(kv_cache, (1,), (1,)).view(torch.uint8)


@triton.jit
def find_run(kv_ptr, block, head, block_stride, head_stride):
    """Byte pointer to a run. Blocks can lie beyond 2 ** 31 bytes."""
    return kv_ptr + block.to(tl.int64) * block_stride + head.to(tl.int64) * head_stride


@triton.jit
def find_pages(kv_ptr, entries, index, head_offset, block_stride):
    """Byte pointers to runs, by their places in a block table from ``entries`` on."""
    page = tl.load(entries + index)
    return kv_ptr + page.to(tl.int64) * block_stride + head_offset


@triton.jit
def dense_rows(run, place, D: tl.constexpr):
    """Pointers to tokens of dense blocks: ``layout.BlockForm.GPU``.

    Args:
        run: Pointers to elements at the start of runs.
        place: Places of tokens in their blocks.
        D: Head size. A key starts where the answer points to, its value ``D`` elements behind.
    """
    return run + place * (2 * D)


def element_type(dtype: torch.dtype) -> Any:
    """Triton's name of a cache dtype, for a ``tl.constexpr`` argument."""
    return {
        torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32
    }[dtype]  # fmt: skip
