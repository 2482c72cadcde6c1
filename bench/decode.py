"""Decode attention: vLLM's own CPU kernel (bf16 and fp8 cache), and ours over thin blocks.

8 sequences of 4,096 tokens, 32/8 heads of 128 unless told otherwise. The kernels take turns, so
each round meets the same machine; medians of rounds, and of their ratios to vLLM's kernel. With
``--queries`` it is a chunk of a prompt behind a cached prefix: dense in vLLM, thin here; with
``--static`` the channels of ``--kv-select static`` are measured beside it.
Run: ``python -m bench.decode``.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from bench.support.turns import take_turns, timed
from bench.support.vllm_kernel import vllm_attention
from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.cpu.decode import DecodeRows, decode_attention
from think_vllm.kernels.cpu.static_attention import static_attention
from think_vllm.kernels.cpu.static_store import store_static
from think_vllm.kernels.static_cache import StaticChannels
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan, plan_static
from think_vllm.tools.common.machine import this_machine
from think_vllm.tools.common.markdown import table

VLLM_BLOCK_SIZE = 128  # its default on CPUs


def random_channels(count: int, *shape: int) -> torch.Tensor:
    """Some channels of each head in ascending order, ``[..., count]``; the last size is D."""
    return torch.rand(shape).argsort(dim=-1)[..., :count].sort(dim=-1).values


class Batch(NamedTuple):
    """What all kernels are given."""

    query: torch.Tensor  # [num_seqs * queries, Hq, D]: the last queries of each sequence
    num_seqs: int
    num_kv_heads: int
    context: int  # tokens of each sequence

    @property
    def queries(self) -> int:
        """Of each sequence."""
        return len(self.query) // self.num_seqs

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.query.shape[2]

    def table(self, block_size: int) -> torch.Tensor:
        """A block table, each sequence's blocks one after the other."""
        width = -(-self.context // block_size)
        return torch.arange(self.num_seqs * width, dtype=torch.int32).view(self.num_seqs, width)

    def dense_blocks(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A cache of the query's dtype, and its block table."""
        table = self.table(block_size)
        shape = (table.numel(), self.num_kv_heads, block_size, 2 * self.head_size)
        return torch.randn(shape).to(self.query.dtype), table

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Sequence of each query, and the tokens that it attends to."""
        request = np.repeat(np.arange(self.num_seqs, dtype=np.int32), self.queries)
        tokens = np.arange(self.context - self.queries + 1, self.context + 1, dtype=np.int32)
        return request, np.tile(tokens, self.num_seqs)


def vllm_kernel(batch: Batch, kv_cache_dtype: str = "auto") -> Callable[[], None]:
    """Set up vLLM's C++ kernel over dense blocks of the query's dtype, or of fp8."""
    cache, table = batch.dense_blocks(VLLM_BLOCK_SIZE)
    if kv_cache_dtype == "fp8":
        cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
    isa = "vec" if batch.head_size % 32 == 0 else "vec16"
    lengths = [batch.queries] * batch.num_seqs
    contexts, scale = [batch.context] * batch.num_seqs, batch.head_size**-0.5
    run, _ = vllm_attention(
        batch.query, cache, table, lengths, contexts, scale, isa, kv_cache_dtype
    )
    return run


def think_kernel(batch: Batch, plan: BlockPlan, thin: bool) -> Callable[[], None]:
    """Set up our kernel over contexts whose full spans, up to the queries, are thin or dense."""
    cache, table = batch.dense_blocks(plan.block_size)
    spans = plan.rule.prompt_spans(batch.context - batch.queries + 1) if thin else 0
    if spans:
        request = np.repeat(np.arange(batch.num_seqs), spans)
        kept = [
            random_channels(number, len(request), batch.num_kv_heads, batch.head_size)
            for number in (plan.key_channels, plan.value_channels)[: 1 + plan.prunes_values]
        ]
        channels = torch.cat(kept, dim=-1).to(torch.uint8)
        span = np.tile(np.arange(spans), batch.num_seqs)
        compact_spans(cache, table, request, span, channels, plan)
    rows = DecodeRows(*batch.rows(), np.full(len(batch.query), spans, np.int32))
    query, out, scale = batch.query, torch.empty_like(batch.query), batch.head_size**-0.5
    return lambda: decode_attention(query, cache, table, rows, plan, scale, out)


def static_kernel(batch: Batch, plan: StaticPlan) -> Callable[[], None]:
    """Set up our kernel over blocks that are thin from the first token on."""
    query, table = batch.query, batch.table(plan.block_size)
    num_tokens = table.numel() * plan.block_size
    dtype = torch.uint8 if plan.is_quantized else query.dtype
    channels = plan.layout.token_bytes // dtype.itemsize
    shape = (table.numel(), batch.num_kv_heads, plan.block_size, channels)
    cache = torch.empty(shape, dtype=dtype)
    kept = StaticChannels(
        *(
            random_channels(number, batch.num_kv_heads, batch.head_size)
            for number in (plan.key_channels, plan.value_channels)
        )
    )
    heads = (batch.num_kv_heads, batch.head_size)
    key, value = torch.randn(2, num_tokens, *heads).to(query.dtype)
    store_static(key, value, cache, torch.arange(num_tokens), kept, plan)
    request, lengths = batch.rows()
    out, scale = torch.empty_like(query), batch.head_size**-0.5
    return lambda: static_attention(query, cache, table, request, lengths, kept, plan, scale, out)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=1, help="last tokens of each sequence")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.0, 0.4, 0.5])
    parser.add_argument("--value-ratio", type=float, default=0.0, help="of value channels")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--static", action="store_true", help="static channels, too")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    num_queries = options.sequences * options.queries
    query = torch.randn(num_queries, options.heads, options.head_size).to(dtype)
    batch = Batch(query, options.sequences, options.kv_heads, options.context)
    kernels = {"vLLM": vllm_kernel(batch), "vLLM, fp8 cache": vllm_kernel(batch, "fp8")}
    for name in options.formats:
        for ratio in options.ratios:
            values = options.value_ratio
            config = ThinkConfig.model_validate(
                {"kv_channel_prune": ratio, "kv_value_prune": values, "kv_quant": name}
            )
            pruned = f"{ratio:g}, values {values:g}" if values else f"{ratio:g}"
            if options.static and not config.format.has_groups:
                static = plan_static(config, options.head_size, dtype.itemsize)
                if static is not None:
                    title = f"static, {name}, {pruned}"
                    kernels[title] = static_kernel(batch, static)
            plan = plan_blocks(config, options.head_size, dtype.itemsize)
            if plan is None:
                continue
            title = f"{name}, {pruned} ({plan.span_blocks} blocks of {plan.block_size} -> "
            title += f"{plan.thin_blocks})"
            kernels[title] = think_kernel(batch, plan, True)
            if name == "none":
                title = f"dense blocks of {plan.block_size}"
                kernels[title] = think_kernel(batch, plan, False)
    times = take_turns({name: timed(run) for name, run in kernels.items()}, options.rounds)
    print(this_machine())
    print(
        f"{options.sequences} x {options.context} tokens, {options.queries} queries each, "
        f"{options.heads}/{options.kv_heads} heads of {options.head_size}, {options.dtype}, "
        f"{torch.get_num_threads()} threads, "
        f"{options.rounds} rounds\n"
    )
    rows = [
        (name, f"{1e3 * times.median(name):.2f}", f"{times.ratio(name, 'vLLM'):.2f}")
        for name in kernels
    ]
    print(table(["kernel", "ms", "of vLLM's time"], rows))


if __name__ == "__main__":
    main()
