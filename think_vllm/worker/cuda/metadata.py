"""A step's tensors on their way to a GPU, and the blocks that FlashAttention reads there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from think_vllm.worker.step_tensors import Chunks, StepTensors

#: Tokens of a tile of FlashAttention, at most: entries behind a context that it may look at.
_FLASH_TILE = 256

T = TypeVar("T")

#: Triton compiles kernels for pointers to multiples of 16 bytes apart from those for others.
_ALIGN = 4


def with_pages(
    tensors: StepTensors, block_table: torch.Tensor, decode_table: torch.Tensor, block_size: int
) -> StepTensors:
    """Prepare chunks that FlashAttention can read from the cache: their blocks, int32 [n, width].

    Those are the ones that see earlier steps' keys and no thin spans.

    Args:
        tensors: On the device.
        block_table: int32 [num_reqs, width]. Of prompt queries.
        decode_table: int32 [rows, width]. Of queries past their prompts: the same, or
            ``table_of_entries`` of it.
        block_size: Tokens of a block.
    """

    def pages(chunks: Chunks, table: torch.Tensor) -> torch.Tensor | None:
        if chunks.fresh or chunks.thin_spans is not None:
            return None
        return _rows(table, chunks.request, chunks.max_seq_len, block_size)

    return tensors.prepare(
        lambda chunks: pages(chunks, block_table), lambda chunks: pages(chunks, decode_table)
    )


def _rows(
    table: torch.Tensor, request: torch.Tensor, max_tokens: int, block_size: int
) -> torch.Tensor:
    """Entries of a block table from the start of each request's row on, a copy.

    Enough for ``max_tokens`` tokens, and a tile more where the table has them.
    """
    needed = -(-max_tokens // block_size)
    width = needed + -(-_FLASH_TILE // block_size)
    if needed <= table.shape[1]:
        return table[:, :width].index_select(0, request)
    # A row begins at every entry. Nothing reads what is behind a request's own entries.
    entries = request[:, None] + torch.arange(width, dtype=torch.int32, device=table.device)
    return table.flatten()[entries.clamp_(max=table.shape[0] - 1)]


def to_device(parts: T, device: torch.device) -> T:
    """Send all tensors of nested dataclasses in one copy, without waiting for it."""
    found = list(_tensors(parts))
    if not found:
        return parts
    sizes = [tensor.numel() for tensor in found]
    starts = np.cumsum([0] + [-(-size // _ALIGN) * _ALIGN for size in sizes])
    packed = torch.zeros(int(starts[-1]), dtype=torch.int32)
    for tensor, start, size in zip(found, starts, sizes, strict=False):
        packed[start : start + size] = tensor
    sent = async_tensor_h2d(packed, device=device)
    views = (sent[start : start + size] for start, size in zip(starts, sizes, strict=False))
    made: T = _replaced(parts, views)
    return made


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    if isinstance(part, torch.Tensor):
        yield part
    elif isinstance(part, list):
        for item in part:
            yield from _tensors(item)
    elif is_dataclass(part):
        for member in fields(part):
            yield from _tensors(getattr(part, member.name))


def _replaced(part: Any, views: Iterator[torch.Tensor]) -> Any:
    if isinstance(part, torch.Tensor):
        return next(views)
    if isinstance(part, list):
        return [_replaced(item, views) for item in part]
    if is_dataclass(part) and not isinstance(part, type):
        names = [member.name for member in fields(part)]
        return type(part)(**{name: _replaced(getattr(part, name), views) for name in names})
    return part
