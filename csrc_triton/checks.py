"""Checks that launchers share. They read shapes and dtypes only, so they never wait for a GPU."""

import torch

#: Dtypes of caches, keys, values and queries.
ELEMENTS = (torch.bfloat16, torch.float16, torch.float32)


def check_tensor(
    who: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Check a tensor that a kernel indexes without strides.

    Args:
        who: The launcher, named in messages.
        name: The argument, named in messages.
        tensor: What was given.
        dtype: What is expected.
        shape: What is expected.
        device: Where it is expected.

    Raises:
        ValueError: Saying who, what was given and what is expected.
    """
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{who}: {name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; expected contiguous {dtype} {tuple(shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{who}: {name} is on {tensor.device}; expected {device}")


def check_tasks(
    who: str,
    request: torch.Tensor,
    name: str,
    other: torch.Tensor,
    device: torch.device,
) -> None:
    """Check two parallel vectors of tasks: ``request`` and the one called ``name``, int32 [n]."""
    check_tensor(who, "request", request, torch.int32, (request.numel(),), device)
    check_tensor(who, name, other, torch.int32, (request.numel(),), device)


def check_heads(
    who: str,
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    head_size: int,
    device: torch.device,
) -> None:
    """Check ``[tokens, heads, head_size]`` whose strides 0 and 1 are free."""
    fits = tensor.dim() == 3 and tensor.shape[2] == head_size and tensor.dtype in dtypes
    if not fits or tensor.stride(2) != 1:
        expected = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{who}: {name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; expected {expected} [tokens, heads, {head_size}], stride 2 being 1"
        )
    if tensor.device != device:
        raise ValueError(f"{who}: {name} is on {tensor.device}; expected {device}")
