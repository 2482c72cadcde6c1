"""Energies of channels: what ``think_vllm/worker/policies.py`` makes scores of.

Source: ThinK, arXiv 2407.21018, section 3.2: a key channel scores the norm of its observed queries
times the norm of its keys. Means of squares rank channels alike; with grouped queries the
mean runs over the heads of the group as well. A value channel scores the norm of the observed
queries' outputs; see ``kernels/reference/scoring.py``. Sums run in an order that depends on
nothing but the prompt itself, so the same prompt chooses the same channels in any batch.
"""

import torch
import triton
import triton.language as tl

from csrc_triton.aot import AotCase, aot_case
from csrc_triton.blocks import (
    cache_bytes,
    cache_strides,
    dense_rows,
    element_type,
    find_run,
    make_layout,
)
from csrc_triton.checks import check_heads, check_tasks, check_tensor
from csrc_triton.launch import kernel, row_strides, whole_stride
from csrc_triton.quantization import as_float, element_pointer, load_bits
from think_vllm.kernels.checks import ELEMENTS, check_cache, check_group
from think_vllm.plan.planner import BlockPlan

#: Tokens whose keys one program sums up, in whole blocks.
CHUNK_TOKENS = 1024
#: Channels of such a program: a 128-byte line of a token's key, of two-byte elements.
CHANNELS = tl.constexpr(64)
WARPS = 4
#: Of a program that sums up the queries of one KV head.
QUERY_WARPS = 4


def key_energy(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: torch.Tensor,
    prompt_len: torch.Tensor,
    plan: BlockPlan,
    max_tokens: int,
    first_block: torch.Tensor | None = None,
) -> torch.Tensor:
    """Average each channel's squared keys over the dense blocks of prompts.

    Args:
        kv_cache: ``[num_blocks, Hk, N, 2 * D]``; stride of dim 0 is free.
        block_table: ``[num_requests, W]`` int32.
        request: ``[n]`` int32. Row of the block table.
        prompt_len: ``[n]`` int32. Tokens of the prompt, at least one of them in a dense block.
        plan: How blocks are laid out.
        max_tokens: Most tokens of a prompt in dense blocks, or more, known to the host.
        first_block: ``[n]`` int32. First dense block; those before it are left out. None for 0.

    Returns:
        ``[n, Hk, D]`` float32.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, device = "key_energy", kv_cache.device
    check_cache(who, kv_cache, block_table, plan)
    check_tasks(who, request, "prompt_len", prompt_len, device)
    if first_block is None:
        first_block = torch.zeros_like(request)
    check_tasks(who, request, "first_block", first_block, device)
    if max_tokens < 1:
        raise ValueError(f"{who}: max_tokens is {max_tokens}; expected at least 1")
    num_tasks, num_heads = request.numel(), kv_cache.shape[1]
    energy = torch.empty(num_tasks, num_heads, plan.head_size, device=device)
    if num_tasks == 0:
        return energy
    constants = {"L": make_layout(plan, kv_cache.dtype), "CHUNK": _chunk_blocks(plan)}
    num_chunks = triton.cdiv(max_tokens, plan.block_size * _chunk_blocks(plan))
    shape = (num_tasks, num_heads, num_chunks, plan.head_size)
    parts = torch.empty(shape, device=device)
    grid = (num_tasks * num_chunks, num_heads, triton.cdiv(plan.head_size, CHANNELS.value))
    chunk_kernel[grid](
        cache_bytes(kv_cache),
        block_table,
        request,
        prompt_len,
        first_block,
        parts,
        num_heads,
        num_chunks,
        block_table.stride(0),
        **cache_strides(who, kv_cache),
        **constants,
        num_warps=WARPS,
    )
    mean_kernel[(num_tasks, num_heads)](
        parts, prompt_len, first_block, energy, num_heads, num_chunks, **constants, num_warps=1
    )
    return energy


def add_query_energy(
    query: torch.Tensor, begin: torch.Tensor, end: torch.Tensor, energy: torch.Tensor
) -> None:
    """Add tokens ``begin[i] .. end[i] - 1`` to the energy of the ``i``-th observation window.

    Tokens are added in order, so a window that arrives in chunks adds up to the same bits.

    Args:
        query: ``[tokens, Hq, D]`` bf16, fp16 or fp32; strides of dims 0 and 1 are free. Queries; or
            the outputs of attention, for value channels.
        begin: ``[n]`` int32. First token.
        end: ``[n]`` int32. Token behind the last.
        energy: ``[n, Hk, D]`` float32. Gains per token the mean over the heads of a group of the
            squared queries.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit each other.
    """
    who, device = "add_query_energy", query.device
    check_tensor(who, "begin", begin, torch.int32, (begin.numel(),), device)
    check_tensor(who, "end", end, torch.int32, (begin.numel(),), device)
    if energy.dim() != 3 or energy.shape[0] != begin.numel():
        raise ValueError(
            f"{who}: energy is {tuple(energy.shape)}, there are {begin.numel()} windows; expected "
            "[windows, Hk, D]"
        )
    check_tensor(who, "energy", energy, torch.float32, tuple(energy.shape), device)
    num_windows, num_kv_heads, head_size = energy.shape
    check_heads(who, "query", query, ELEMENTS, head_size, device)
    check_group(who, query.shape[1], num_kv_heads)
    if num_windows == 0:
        return
    query_kernel[(num_windows, num_kv_heads)](
        query.view(torch.uint8),
        begin,
        end,
        energy,
        *(stride * query.itemsize for stride in row_strides(who, "query", query)),
        num_kv_heads,
        GROUP=query.shape[1] // num_kv_heads,
        D=head_size,
        DTYPE=element_type(query.dtype),
        num_warps=QUERY_WARPS,
    )


def _chunk_blocks(plan: BlockPlan) -> int:
    return max(1, CHUNK_TOKENS // plan.block_size)


@kernel(unaligned=("table_ptr", "request_ptr", "length_ptr", "first_ptr"))
def chunk_kernel(
    kv_ptr, table_ptr, request_ptr, length_ptr, first_ptr, part_ptr, num_heads, num_chunks,
    table_stride, block_stride, head_stride,
    L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of squares per (prompt, chunk, KV head, tile of channels)."""
    block_stride, head_stride = whole_stride(block_stride), whole_stride(head_stride)
    SIZE: tl.constexpr = L.DTYPE.primitive_bitwidth // 8
    N: tl.constexpr = L.N
    N_PAD: tl.constexpr = triton.next_power_of_2(L.N)
    prompt, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    head = tl.program_id(1)
    # Chunks are counted from the first dense block on.
    first = tl.load(first_ptr + prompt)
    length = tl.load(length_ptr + prompt) - first * N
    if chunk * CHUNK * N < length:
        channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        place = tl.arange(0, N_PAD)
        entries = table_ptr + tl.load(request_ptr + prompt).to(tl.int64) * table_stride + first
        squares = tl.zeros((N_PAD, CHANNELS), tl.float32)
        last = tl.minimum((chunk + 1) * CHUNK, (length + N - 1) // N)
        for entry in range(chunk * CHUNK, last):
            block = tl.load(entries + entry)
            run = find_run(kv_ptr, block, head, block_stride, head_stride)
            held = (place < N) & (entry * N + place < length)
            rows = dense_rows(element_pointer(run, SIZE), place, L.D)
            pointer = rows[:, None] + channel[None, :]
            bits = load_bits(pointer, held[:, None] & (channel < L.D)[None, :])
            keys = as_float(bits, L.DTYPE)
            squares += keys * keys
        part = (prompt.to(tl.int64) * num_heads + head) * num_chunks + chunk
        tl.store(part_ptr + part * L.D + channel, tl.sum(squares, axis=0), mask=channel < L.D)


@kernel(unaligned=("length_ptr", "first_ptr"))
def mean_kernel(
    part_ptr, length_ptr, first_ptr, energy_ptr, num_heads, num_chunks,
    L: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Add up the chunks of a (prompt, KV head), in order."""
    D_PAD: tl.constexpr = triton.next_power_of_2(L.D)
    CHUNK_TOKENS: tl.constexpr = CHUNK * L.N
    item = tl.program_id(0).to(tl.int64) * num_heads + tl.program_id(1)
    length = tl.load(length_ptr + tl.program_id(0)) - tl.load(first_ptr + tl.program_id(0)) * L.N
    channel = tl.arange(0, D_PAD)
    total = tl.zeros((D_PAD,), tl.float32)
    for chunk in range(0, (length + CHUNK_TOKENS - 1) // CHUNK_TOKENS):
        part = part_ptr + (item * num_chunks + chunk) * L.D
        total += tl.load(part + channel, mask=channel < L.D, other=0.0)
    mean = tl.div_rn(total, tl.maximum(length, 1).to(tl.float32))
    tl.store(energy_ptr + item * L.D + channel, mean, mask=channel < L.D)


@kernel(unaligned=("begin_ptr", "end_ptr"))
def query_kernel(
    query_ptr, begin_ptr, end_ptr, energy_ptr, query_stride, query_head_stride, num_kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One program per (window, KV head). Strides are in bytes."""
    GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
    D_PAD: tl.constexpr = triton.next_power_of_2(D)
    query_stride, query_head_stride = whole_stride(query_stride), whole_stride(query_head_stride)
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    window, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel, member = tl.arange(0, D_PAD), tl.arange(0, GROUP_PAD)
    mask = (member < GROUP)[:, None] & (channel < D)[None, :]
    heads = query_ptr + (kv_head * GROUP + member) * query_head_stride
    target = energy_ptr + (window.to(tl.int64) * num_kv_heads + kv_head) * D + channel
    energy = tl.load(target, mask=channel < D, other=0.0)
    for token in range(tl.load(begin_ptr + window), tl.load(end_ptr + window)):
        row = element_pointer(heads + token * query_stride.to(tl.int64), SIZE)
        bits = load_bits(row[:, None] + channel[None, :], mask)
        queries = as_float(bits, DTYPE)
        energy += tl.div_rn(tl.sum(queries * queries, axis=0), GROUP * 1.0)
    tl.store(target, energy, mask=channel < D)


def aot_cases(plan: BlockPlan, dtype: torch.dtype) -> list[AotCase]:
    """What ``csrc_triton/aot.py`` compiles; queries in groups of 4."""
    constants = {"L": make_layout(plan, dtype), "CHUNK": _chunk_blocks(plan)}
    group = {"GROUP": 4, "D": plan.head_size, "DTYPE": element_type(dtype)}
    floats = {"part": "fp32", "energy": "fp32"}
    return [
        aot_case(chunk_kernel, constants, {"num_warps": WARPS}, kv="u8", **floats),
        aot_case(mean_kernel, constants, {"num_warps": 1}, **floats),
        aot_case(query_kernel, group, {"num_warps": QUERY_WARPS}, query="u8", **floats),
    ]
