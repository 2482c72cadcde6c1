"""Blocks as kernels see them: flat views of a cache, sizes, strides, and quantized matrices.

The class of a matrix is a compile-time tag: kernels pick the code for an encoding by it.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from think_vllm.kernels.cpu.elements import flat_elements
from think_vllm.plan.formats import Encoding
from think_vllm.plan.matrix_layout import MatrixLayout
from think_vllm.plan.planner import BlockPlan


class Cache(NamedTuple):
    """One cache, four times the same memory."""

    elements: Any  # of the cache's dtype, see elements.py
    bytes: Any  # uint8
    halves: Any  # int16: float16 scales and zeros
    floats: Any  # float32


class PlainMatrix(NamedTuple):
    """Elements as they are. Offsets and strides count elements, from the start of the run."""

    offset: int
    row_stride: int


class Fp8Matrix(NamedTuple):
    """float8 e4m3 codes. Counts bytes; ``scale`` counts float32."""

    offset: int
    row_stride: int
    scale: int


class Fp8Keys(NamedTuple):
    """As ``Fp8Matrix``, with a zero for every row; ``zeros`` counts float16."""

    offset: int
    row_stride: int
    scale: int
    zeros: int


class Fp8Columns(NamedTuple):
    """As ``Fp8Matrix``, but with a scale for every column: keys of static blocks."""

    offset: int
    row_stride: int
    scales: int


class Fp8Rows(NamedTuple):
    """As ``Fp8Matrix``, but with a scale for every row: values of static blocks."""

    offset: int
    row_stride: int
    scales: int


class Int4Matrix(NamedTuple):
    """4-bit codes. Counts bytes; ``scales`` and ``zeros`` count float16, ``[G, rows]``."""

    offset: int
    row_stride: int
    scales: int
    zeros: int
    rows: int
    group: int


class Int2Matrix(NamedTuple):
    """2-bit codes; otherwise as ``Int4Matrix``."""

    offset: int
    row_stride: int
    scales: int
    zeros: int
    rows: int
    group: int


class BlockShape(NamedTuple):
    """Sizes, offsets and strides, int64. In elements of the cache unless they say bytes."""

    kv_heads: int
    head_size: int
    table_stride: int
    block_stride: int
    run_stride: int
    itemsize: int
    block_size: int
    span_blocks: int
    thin_blocks: int
    thin_tokens: int
    key_channels: int
    value_channels: int
    kept_channels: int
    channels_offset: int  # bytes; of the table of key channels, -1 if there is none
    value_channels_offset: int  # bytes; of the table of value channels, -1 if there is none


Matrix = PlainMatrix | Fp8Matrix | Fp8Keys | Fp8Columns | Fp8Rows | Int4Matrix | Int2Matrix


class Blocks(NamedTuple):
    """What kernels get; apart, because numba's parallel loops take no nested tuples."""

    cache: Cache
    shape: BlockShape
    keys: Matrix
    values: Matrix


def view_blocks(kv_cache: torch.Tensor, block_table: torch.Tensor, plan: BlockPlan) -> Blocks:
    """View and describe a checked cache, ``[num_blocks, Hk, N, 2 * D]``."""
    layout = plan.layout
    elements = flat_elements(kv_cache)
    as_bytes = elements.view(np.uint8)
    cache = Cache(elements, as_bytes, as_bytes.view(np.int16), as_bytes.view(np.float32))
    shape = BlockShape(
        kv_heads=kv_cache.shape[1],
        head_size=plan.head_size,
        table_stride=block_table.stride(0),
        block_stride=kv_cache.stride(0),
        run_stride=kv_cache.stride(1),
        itemsize=plan.itemsize,
        block_size=plan.block_size,
        span_blocks=plan.span_blocks,
        thin_blocks=plan.thin_blocks,
        thin_tokens=plan.thin_block_tokens,
        key_channels=plan.key_channels,
        value_channels=plan.value_channels,
        kept_channels=plan.kept_channels,
        channels_offset=layout.table_offset if layout.has_table else -1,
        value_channels_offset=layout.value_table_offset if layout.has_value_table else -1,
    )
    return Blocks(cache, shape, _matrix(layout.keys), _matrix(layout.values))


def _matrix(layout: MatrixLayout) -> Matrix:
    if layout.encoding is Encoding.PLAIN:
        return PlainMatrix(layout.offset // layout.itemsize, layout.columns)
    if layout.encoding is Encoding.FP8:
        quantized = (layout.offset, layout.row_bytes, layout.scales_offset // 4)
        return (
            Fp8Keys(*quantized, layout.zero_points_offset // 2)
            if layout.has_zero_points
            else Fp8Matrix(*quantized)
        )
    kind = Int4Matrix if layout.encoding is Encoding.INT4 else Int2Matrix
    return kind(
        offset=layout.offset,
        row_stride=layout.row_bytes,
        scales=layout.scales_offset // 2,
        zeros=layout.zero_points_offset // 2,
        rows=layout.rows,
        group=layout.group,
    )
