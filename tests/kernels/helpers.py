"""Random caches in which every byte that must not be read is a NaN."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from think_vllm.kernels.cpu.decode import DecodeRows
from think_vllm.kernels.reference.compaction import split_dense, thin_run, write_thin
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig

#: Rounding the output, relative to the largest one: half a unit in the last of 24, 8 or 11 bits.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
#: A few float32 roundings of sums of values, which are standard normal: at most 4 or so.
SUMMATION = 4e-6


#: Every format, with and without pruned keys and values. 0.4 keeps 36 of 64 value channels:
#: no whole vectors, and groups that are not full.
FORMATS = [
    {"quant": quant, "ratio": ratio, "value_ratio": value_ratio}
    for quant in ("none", "fp8", "kivi4", "k4v2", "kivi2")
    for ratio, value_ratio in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.4), (0.5, 0.5))
    if (quant, ratio, value_ratio) != ("none", 0.0, 0.0)
]
formats = pytest.mark.parametrize("thin", FORMATS, ids=lambda x: "-".join(map(str, x.values())))
#: Of blocks that are compacted: all magnitudes, NaN and infinities, if they are random bits.
KINDS = [
    *((torch.bfloat16, "usual"), (torch.bfloat16, "biased"), (torch.float32, "biased")),
    *((torch.float32, "bits"), (torch.float16, "bits")),
]


def make_plan(
    head_size: int,
    dtype: torch.dtype,
    block_size: int | None = 16,
    ratio: float = 0.5,
    quant: str = "none",
    group: int = 32,
    value_ratio: float = 0.0,
) -> BlockPlan:
    settings = {"kv_channel_prune": ratio, "kv_value_prune": value_ratio}
    settings |= {"kv_quant": quant, "kv_quant_group": group}
    config = ThinkConfig.model_validate(settings)
    plan = plan_blocks(config, head_size, dtype.itemsize, block_size)
    assert plan is not None
    return plan


@dataclass
class Case:
    """A batch of decode rows over a poisoned cache."""

    plan: BlockPlan
    query: torch.Tensor
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    rows: DecodeRows
    scale: float

    @property
    def reference_rows(self) -> tuple[list[int], list[int], list[int]]:
        rows = self.rows
        return rows.request.tolist(), rows.seq_len.tolist(), rows.thin_spans.tolist()


def make_rows(rows: list[tuple[int, int, int]]) -> DecodeRows:
    """(request, seq_len, thin_spans) per row."""
    request, seq_len, thin_spans = np.array(rows, np.int32).reshape(-1, 3).T.copy()
    return DecodeRows(request, seq_len, thin_spans)


def make_case(
    plan: BlockPlan,
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    contexts: list[tuple[int, int]],
    seed: int = 0,
    gap_blocks: int = 0,
    form: BlockForm = BlockForm.CPU,
    key_bias: float = 0.0,
) -> Case:
    """Build one request per (seq_len, thin_spans) in ``contexts``, with one row each.

    Between two blocks of this layer lie ``gap_blocks`` of others, filled with NaN. ``key_bias`` is
    added to some channels of thin keys, and subtracted from others.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    needed = [thin * plan.span_blocks for _, thin in contexts]
    width = max([-(-seq_len // plan.block_size) for seq_len, _ in contexts] + needed) + 2
    num_blocks = len(contexts) * width + 1
    shape = (num_blocks, 1 + gap_blocks, num_kv_heads, plan.block_size, 2 * plan.head_size)
    kv_cache = torch.full(shape, torch.nan, dtype=dtype)[:, 0]
    # Block 0 stays NaN and takes every row entry that must not be read.
    block_table = torch.zeros(len(contexts), width, dtype=torch.int32)
    blocks = 1 + torch.randperm(num_blocks - 1, generator=generator)
    blocks = blocks.view(len(contexts), width).to(torch.int32)
    for request, (seq_len, thin_spans) in enumerate(contexts):
        for span in range(thin_spans):
            table = random_channels(plan, num_kv_heads, generator)
            for k in range(plan.thin_blocks):
                entry = span * plan.span_blocks + k
                block = int(blocks[request, entry])
                block_table[request, entry] = block
                fill_thin_block(kv_cache, block, k, table, plan, random, form, key_bias)
        first = thin_spans * plan.span_blocks
        for entry in range(first, -(-seq_len // plan.block_size)):
            block = int(blocks[request, entry])
            block_table[request, entry] = block
            count = min(plan.block_size, seq_len - entry * plan.block_size)
            fill_dense_block(kv_cache, block, count, plan, random, form)
    return Case(
        plan=plan,
        query=random(len(contexts), num_heads, plan.head_size),
        kv_cache=kv_cache,
        block_table=block_table,
        rows=make_rows([(i, seq_len, thin) for i, (seq_len, thin) in enumerate(contexts)]),
        scale=plan.head_size**-0.5,
    )


def make_layers(
    plan: BlockPlan,
    dtype: torch.dtype,
    num_kv_heads: int,
    num_requests: int,
    spans: int,
    kind: str = "bits",
    form: BlockForm = BlockForm.CPU,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two dense layers side by side: ``[2, num_blocks, Hk, N, 2 * D]``, and a block table.

    They are random ``bits``, ``usual`` numbers of any magnitude, or such with ``biased`` keys.
    """
    generator = torch.Generator().manual_seed(0)
    width = spans * plan.span_blocks + 1
    num_blocks = num_requests * width + 3
    shape = (num_blocks, 2, num_kv_heads, plan.block_size, 2 * plan.head_size * dtype.itemsize)
    data = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    layers = data.view(dtype).transpose(0, 1)
    if kind != "bits":
        size = torch.exp(2 * torch.randn(layers.shape, generator=generator))
        layers.copy_(torch.randn(layers.shape, generator=generator) * size)
    if kind == "biased":
        for kv_cache in layers:
            bias_keys(split_dense(kv_cache, form)[0])
    blocks = torch.randperm(num_blocks, generator=generator)[: num_requests * width]
    return layers, blocks.view(num_requests, width).to(torch.int32)


def make_channels(plan: BlockPlan, num_kv_heads: int, *shape: int) -> torch.Tensor:
    """Kept channels of spans: ``[*shape, Hk, K]`` uint8."""
    generator = torch.Generator().manual_seed(1)
    tables = [random_channels(plan, num_kv_heads, generator) for _ in range(math.prod(shape))]
    return torch.stack(tables).view(*shape, num_kv_heads, -1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


def bias_keys(keys: torch.Tensor) -> None:
    """Move channels of ``[..., N, D]`` away from 0, as key biases do; one token is far off.

    Some are farther away than float16 goes.
    """
    keys[..., 1::8] += 5
    keys[..., 3::8] += 400
    keys[..., 5::8] -= 70_000
    keys[..., 7::8] -= 400
    keys[..., 0, 3::8] *= -20


def random_channels(plan: BlockPlan, num_kv_heads: int, generator: torch.Generator) -> torch.Tensor:
    """Kept channels of one span: ``[Hk, K]`` uint8, those of keys and of values ascending."""
    kept = []
    for count in (plan.key_channels, plan.value_channels)[: 1 + plan.prunes_values]:
        order = torch.rand(num_kv_heads, plan.head_size, generator=generator).argsort(dim=1)
        kept.append(order[:, :count].sort(dim=1).values.to(torch.uint8))
    return torch.cat(kept, dim=1)


def fill_dense_block(kv_cache, block, count, plan, random, form=BlockForm.CPU):
    """Write the first ``count`` tokens; the others stay NaN."""
    num_kv_heads = kv_cache.shape[1]
    keys, values = split_dense(kv_cache, form)
    keys.transpose(2, 3)[block, :, :, :count] = random(num_kv_heads, plan.head_size, count)
    values[block, :, :count] = random(num_kv_heads, count, plan.head_size)


def fill_thin_block(kv_cache, block, index, table, plan, random, form=BlockForm.CPU, key_bias=0.0):
    """Write the ``index``-th thin block of a span; unused bytes become 0xFF."""
    count = min(plan.thin_block_tokens, plan.span_tokens - index * plan.thin_block_tokens)
    for head in range(kv_cache.shape[1]):
        thin_run(kv_cache, block, head).fill_(0xFF)
        keys, values = random(plan.key_channels, count), random(count, plan.value_channels)
        keys[3::8] += key_bias
        keys[7::8] -= key_bias
        write_thin(kv_cache, block, head, keys, values, table[head], plan, form)
