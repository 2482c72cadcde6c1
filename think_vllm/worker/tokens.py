"""Tokens of a step: a slice where they are contiguous (a view, no copy), else their indices."""

import torch

from think_vllm.worker.step import Int64Array

#: Tokens of a step: a slice where they are neighbours, else their indices.
Tokens = slice | torch.Tensor


def token_range(indices: Int64Array, dtype: torch.dtype = torch.int64) -> Tokens:
    """Tokens of a step, given in ascending order.

    Args:
        indices: int64 [n], at least one.
        dtype: Of indices that are no slice.
    """
    first, last = int(indices[0]), int(indices[-1])
    # Indices ascend strictly, so the range is full if its ends say so.
    if last - first + 1 == indices.size:
        return slice(first, last + 1)
    return torch.from_numpy(indices).to(dtype)


def put_back(output: torch.Tensor, tokens: Tokens, part: torch.Tensor) -> None:
    """Write what was computed in ``part = output[tokens]`` into ``output``.

    ``part`` is a view of it for a slice, and then there is nothing left to do; else a copy.
    """
    if isinstance(tokens, torch.Tensor):
        output[tokens] = part
