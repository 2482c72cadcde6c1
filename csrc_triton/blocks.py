"""Blocks as kernels see them: compile-time sizes and byte offsets, run-time strides."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from csrc_triton.launch import STRIDE_MULTIPLE, CompileTime
from think_vllm.plan.matrix_layout import MatrixLayout
from think_vllm.plan.planner import BlockPlan


@dataclass(frozen=True, eq=False)
class Matrix(CompileTime):
    """Where the keys or the values of a thin block are, in bytes from the start of a run."""

    OFFSET: int  # where codes begin
    ROW: int  # bytes of a row of codes
    ROWS: int  # of the matrix: kept channels of keys, tokens of values
    BITS: int  # of a code; 0 for elements of the cache's dtype, 8 for e4m3
    GROUP: int  # elements that share a scale
    SCALES: int  # where scales begin; integer codes have their zeros among them
    ZEROS: int  # where zeros of e4m3 keys begin
    TABLE: int  # where the table of kept channels is; -1 if none was pruned


@dataclass(frozen=True, eq=False)
class Layout(CompileTime):
    """What a kernel knows of a plan at compile time."""

    D: int  # head size
    N: int  # tokens of a dense block
    SPAN: int  # blocks of a span
    THIN: int  # those that are left of it
    T: int  # tokens of a thin block
    C: int  # kept key channels
    V: int  # kept value channels
    KEYS: Matrix  # keys of a thin block
    VALUES: Matrix  # values of a thin block
    DTYPE: Any  # of the cache


@cache
def make_layout(plan: BlockPlan, dtype: torch.dtype) -> Layout:
    """The layout of a plan's blocks in a cache of ``dtype``."""
    layout = plan.layout

    def matrix(of: MatrixLayout, table: int) -> Matrix:
        return Matrix(
            of.offset, of.row_bytes, of.rows, of.encoding.value, plan.config.kv_quant_group,
            of.scales_offset, of.zero_points_offset, table,
        )  # fmt: skip

    return Layout(
        plan.head_size, plan.block_size, plan.span_blocks, plan.thin_blocks,
        plan.thin_block_tokens, plan.key_channels, plan.value_channels,
        matrix(layout.keys, layout.table_offset if layout.has_table else -1),
        matrix(layout.values, layout.value_table_offset if layout.has_value_table else -1),
        element_type(dtype),
    )  # fmt: skip


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
