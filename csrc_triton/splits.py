"""Splits of a context: how many there are, their memory, and the kernel that adds them up."""

from functools import cache

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import element_type
from csrc_triton.launch import kernel, row_strides, whole_stride

#: Fewest tokens of a split: below, the second kernel costs more than the parallel reading saves.
MIN_SPLIT_TOKENS = 256
MAX_SPLITS = 128
#: Multiprocessors where there is no GPU to ask: an H100's.
MULTIPROCESSORS = 132
#: Share of the places for programs that a launch should fill, its last wave included.
FILLED = 0.85
#: Splits that the second kernel reads at once.
SPLITS_AT_ONCE = tl.constexpr(8)


@cache
def count_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; an H100's for the CPU, where kernels are only tested."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def choose_splits(
    num_rows: int, num_heads: int, max_context: int, multiprocessors: int, programs: int
) -> int:
    """Splits of a context: as few as fill the GPU.

    Depends on host numbers alone, so that CUDA graphs can keep it.

    Args:
        num_rows: Queries of the batch, padding included.
        num_heads: Programs of a row and a split: KV heads, or more for wide groups.
        max_context: Longest context that the launch must serve, in tokens.
        multiprocessors: Of the GPU.
        programs: That one of them holds.
    """
    places = multiprocessors * programs
    most = max(1, min(triton.cdiv(max_context, MIN_SPLIT_TOKENS), MAX_SPLITS))
    best, fullest = 1, 0.0
    for splits in range(1, most + 1):
        wanted = max(1, num_rows * num_heads) * splits
        filled = wanted / (triton.cdiv(wanted, places) * places)
        if filled >= FILLED:
            return splits
        if filled > fullest:
            best, fullest = splits, filled
    return best


def make_workspace(
    num_rows: int, num_heads: int, head_size: int, splits: int, device: torch.device
) -> torch.Tensor:
    """Memory for the results of splits: float32 ``[num_rows, num_heads, splits, D + 2]``."""
    return torch.empty(
        num_rows, num_heads, splits, head_size + 2, dtype=torch.float32, device=device
    )


def combine(workspace: torch.Tensor, seq_len: torch.Tensor, out: torch.Tensor) -> None:
    """Weigh splits against each other.

    Args:
        workspace: Of ``make_workspace``, filled for ``R`` rows or more.
        seq_len: ``[R]`` int32. Rows of 0 tokens become zeros.
        out: ``[R, Hq, D]``. Written.
    """
    num_rows, num_heads, head_size = out.shape
    splits = workspace.shape[2]
    _combine[(num_rows, num_heads)](
        workspace,
        seq_len,
        out,
        *row_strides("combine", "out", out),
        splits,
        **_sizes(head_size, splits),
        num_warps=1,
    )


def _sizes(head_size: int, splits: int) -> dict[str, int]:
    return {
        "D": head_size,
        "D_PAD": triton.next_power_of_2(head_size),
        "SPLITS_PAD": max(MAX_SPLITS, triton.next_power_of_2(splits)),
    }


def combine_case(head_size: int, dtype: torch.dtype) -> AotCase:
    """What ``csrc_triton/aot.py`` compiles."""
    pointers = {"partial": "fp32", "out": str(element_type(dtype))}
    return aot_case(_combine, _sizes(head_size, 1), {"num_warps": 1}, **pointers)


@kernel(unaligned=("seq_len_ptr",))
def _combine(
    partial_ptr, seq_len_ptr, out_ptr, out_stride, out_head_stride, splits,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of one row and query head against each other."""
    out_stride, out_head_stride = whole_stride(out_stride), whole_stride(out_head_stride)
    row, head = tl.program_id(0), tl.program_id(1)
    first = (row.to(tl.int64) * tl.num_programs(1) + head) * splits
    result = combine_splits(partial_ptr + first * (D + 2), splits, D, D_PAD, SPLITS_PAD)
    result = tl.where(tl.load(seq_len_ptr + row) > 0, result, 0.0)
    channels = tl.arange(0, D_PAD)
    out = out_ptr + row.to(tl.int64) * out_stride + head * out_head_stride + channels
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=channels < D)


@triton.jit
def combine_splits(partial, splits, D: tl.constexpr, D_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """Sum up splits, each of ``D`` channels, its maximum and its total, from ``partial`` on."""
    split = tl.arange(0, SPLITS_PAD)
    channels = tl.arange(0, D_PAD)
    tops = tl.load(partial + split * (D + 2) + D, mask=split < splits, other=float("-inf"))
    top = tl.max(tops, axis=0)
    # An empty split has -inf and 0, hence weight 0. A padding row has nothing else.
    top = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    result = tl.zeros((D_PAD,), tl.float32)
    for first in range(0, splits, SPLITS_AT_ONCE):
        several = first + tl.arange(0, SPLITS_AT_ONCE)
        there = several < splits
        at = partial + several * (D + 2)
        factor = tl.exp(tl.load(at + D, mask=there, other=float("-inf")) - top)
        total += tl.sum(factor * tl.load(at + D + 1, mask=there, other=0.0), axis=0)
        mask = there[:, None] & (channels < D)[None, :]
        sums = tl.load(at[:, None] + channels[None, :], mask=mask, other=0.0)
        result += tl.sum(sums * factor[:, None], axis=0)
    return result / tl.where(total == 0.0, 1.0, total)
