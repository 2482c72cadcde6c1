"""Checks that launchers share, beside those of ``think_vllm/kernels/checks.py``, in its terms."""

import torch

from think_vllm.kernels.checks import check_group


def check_tensor(
    who: str,
    name: str,
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    """Check a tensor that a kernel indexes without strides; ``name`` is the argument's."""
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{who}: {name} is {tensor.dtype} {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}; expected contiguous {dtype} {tuple(shape)}"
        )
    if tensor.device != device:
        raise ValueError(f"{who}: {name} is on {tensor.device}; expected {device}")


def check_tasks(
    who: str, request: torch.Tensor, name: str, other: torch.Tensor, device: torch.device
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


def check_tokens(
    who: str,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache: torch.Tensor,
    dtype: torch.dtype,
    head_size: int,
) -> None:
    """Check what is stored: keys and values ``[tokens, Hk, D]``, and at most as many slots."""
    for name, tensor in (("key", key), ("value", value)):
        check_heads(who, name, tensor, (dtype,), head_size, kv_cache.device)
    if key.shape != value.shape or key.shape[1] != kv_cache.shape[1]:
        raise ValueError(
            f"{who}: key is {tuple(key.shape)}, value is {tuple(value.shape)}; expected both "
            f"[tokens, {kv_cache.shape[1]}, {head_size}]"
        )
    slots = slot_mapping.numel()
    check_tensor(who, "slot_mapping", slot_mapping, torch.int64, (slots,), kv_cache.device)
    if slots > key.shape[0]:
        raise ValueError(
            f"{who}: slot_mapping has {slots} slots; expected at most {key.shape[0]}, one for each "
            "token"
        )


def check_attention(
    who: str,
    query: torch.Tensor,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Check queries and outputs ``[tokens, Hq, D]`` of attention, and the factor on ``q . k``.

    The loop over thin blocks takes the maximum of scores before it scales it, so the factor has to
    be positive.
    """
    if query.dim() != 3 or query.shape[2] != head_size or query.stride(2) != 1:
        raise ValueError(
            f"{who}: query has shape {tuple(query.shape)} and strides {query.stride()}; expected "
            f"[tokens, Hq, {head_size}] with contiguous channels"
        )
    check_group(who, query.shape[1], num_kv_heads)
    if out.shape != query.shape or out.stride(2) != 1:
        raise ValueError(
            f"{who}: out has shape {tuple(out.shape)} and strides {out.stride()}; expected "
            f"{tuple(query.shape)} with contiguous channels"
        )
    if query.dtype != dtype or out.dtype != dtype:
        raise ValueError(
            f"{who}: query is {query.dtype}, out is {out.dtype}; expected one dtype, {dtype}"
        )
    if not scale > 0:
        raise ValueError(f"{who}: scale is {scale}; expected a positive factor on scores")
