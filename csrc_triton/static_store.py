"""Store the kept channels of new keys and values in static blocks."""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import cache_bytes, cache_strides
from csrc_triton.checks import check_tokens
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.quantization import (
    MAGNITUDE,
    as_float,
    element_pointer,
    fp8_codes,
    fp8_inverse,
    load_bits,
    store_bits,
)
from csrc_triton.static_blocks import ChannelOrder, check_order, kept_channels, make_layout
from think_vllm.kernels.static_cache import check_static_cache
from think_vllm.plan.static_plan import StaticPlan

#: Tokens of a program: one 32-byte sector of a key channel in bf16.
TOKENS = tl.constexpr(16)
#: Codes are the reference's to the bit: see ``csrc_triton/quantization.py``.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def store_static(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    order: ChannelOrder,
    plan: StaticPlan,
) -> None:
    """Write the kept channels of tokens into static blocks, quantized if the plan says so.

    The launch depends on shapes only, so it can be part of a CUDA graph.

    Args:
        key: ``[T, Hk, D]`` in the model's dtype; strides of dims 0 and 1 are free.
        value: ``[T, Hk, D]``. As ``key``.
        kv_cache: ``[num_blocks, Hk, N, C + V]`` in the model's dtype; in fp8 uint8 ``[num_blocks,
            Hk, N, C + V + 8]``. Stride of dim 0 is free. Written.
        slot_mapping: ``[n]`` int64 with ``n <= T``. Block number times N plus the place in the
            block. Tokens whose slot is negative are skipped; so are those behind the last slot,
            with which vLLM pads a batch.
        order: Of the layer.
        plan: How blocks are laid out.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, num_tokens = "store_static", slot_mapping.numel()
    check_static_cache(who, kv_cache, key.dtype, plan)
    check_order(who, order, kv_cache.shape[1], plan, kv_cache.device)
    check_tokens(who, key, value, slot_mapping, kv_cache, key.dtype, plan.head_size)
    if num_tokens == 0:
        return
    static_store_kernel[(triton.cdiv(num_tokens, TOKENS.value), key.shape[1])](
        key,
        value,
        cache_bytes(kv_cache),
        slot_mapping,
        order.keys,
        order.values,
        num_tokens,
        *row_strides(who, "key", key),
        *row_strides(who, "value", value),
        **cache_strides(who, kv_cache),
        L=make_layout(plan, key.dtype),
        **OPTIONS,
    )


def aot_cases(plan: StaticPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles."""
    layout = make_layout(plan, dtype)
    element = str(layout.DTYPE)
    pointers = {"key": element, "value": element, "kv": "u8", "slot": "i64"}
    return [aot_case(static_store_kernel, {"L": layout}, dict(OPTIONS), **pointers)]


# One binary whatever the batch: see ``csrc_triton/decode.py``.
@kernel(unaligned=("slot_ptr",))
def static_store_kernel(
    key_ptr, value_ptr, kv_ptr, slot_ptr, key_order_ptr, value_order_ptr, num_tokens,
    key_stride, key_head_stride, value_stride, value_head_stride, block_stride, head_stride,
    L: tl.constexpr,
):  # fmt: skip
    """One program per (tile of tokens, KV head)."""
    key_stride, key_head_stride = whole_stride(key_stride), whole_stride(key_head_stride)
    value_stride, value_head_stride = whole_stride(value_stride), whole_stride(value_head_stride)
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    SIZE: tl.constexpr = L.DTYPE.primitive_bitwidth // 8
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1)
    stored = slot >= 0
    block, place = slot // L.N, slot % L.N
    run = kv_ptr + block * block_stride + head * head_stride
    wide = token.to(tl.int64)

    # Channels first, so that threads write neighbouring tokens of a channel.
    index = tl.arange(0, L.C_PAD)
    channel = kept_channels(key_order_ptr, head, index, L.C, L.D)
    mask = (index < L.C)[:, None] & stored[None, :]
    source = element_pointer(key_ptr, SIZE) + head * key_head_stride + wide * key_stride
    bits = load_bits(source[None, :] + channel[:, None], mask)
    if L.BITS == 8:
        keys = as_float(bits, L.DTYPE)
        top = tl.max(keys.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0)
        scales, inverse = fp8_inverse(top)
        codes = fp8_codes(keys * inverse[None, :]).to(tl.uint8)
        tl.store((run + (L.KEYS + place))[None, :] + (index * L.N)[:, None], codes, mask=mask)
        store_bits(element_pointer(run + L.KEY_SCALES, 4) + place, scales, stored)
    else:
        target = element_pointer(run + L.KEYS, SIZE) + place
        store_bits(target[None, :] + (index * L.N)[:, None], bits, mask)

    index = tl.arange(0, L.V_PAD)
    channel = kept_channels(value_order_ptr, head, index, L.V, L.D)
    mask = stored[:, None] & (index < L.V)[None, :]
    source = element_pointer(value_ptr, SIZE) + head * value_head_stride + wide * value_stride
    bits = load_bits(source[:, None] + channel[None, :], mask)
    if L.BITS == 8:
        values = as_float(bits, L.DTYPE)
        top = tl.max(values.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1)
        scales, inverse = fp8_inverse(top)
        codes = fp8_codes(values * inverse[:, None]).to(tl.uint8)
        tl.store((run + place * L.V)[:, None] + index[None, :], codes, mask=mask)
        store_bits(element_pointer(run + L.VALUE_SCALES, 4) + place, scales, stored)
    else:
        target = element_pointer(run, SIZE) + place * L.V
        store_bits(target[:, None] + index[None, :], bits, mask)
