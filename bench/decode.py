"""Decode attention: vLLM's own CPU kernel (bf16 and fp8 cache), and ours over thin blocks.

8 sequences of 4,096 tokens, 32/8 heads of 128 unless told otherwise. The kernels take turns, so
each round meets the same machine; medians of rounds, and of their ratios to vLLM's kernel. With
``--queries`` it is a chunk of a prompt behind a cached prefix: dense in vLLM, thin here; with
``--static`` the channels of ``--kv-select static`` are measured beside it.
Run: ``python -m bench.decode``.
"""

import argparse
from collections.abc import Callable

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


def rows_of(num_seqs: int, queries: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Sequence of each query, and the tokens that it attends to."""
    request = np.repeat(np.arange(num_seqs, dtype=np.int32), queries)
    return request, np.tile(np.arange(context - queries + 1, context + 1, dtype=np.int32), num_seqs)


def vllm_kernel(
    query: torch.Tensor,
    num_seqs: int,
    num_kv_heads: int,
    context: int,
    kv_cache_dtype: str = "auto",
) -> Callable[[], None]:
    """Set up vLLM's C++ kernel over dense blocks of the query's dtype, or of fp8."""
    count, _, head_size = query.shape
    width = -(-context // VLLM_BLOCK_SIZE)
    shape = (num_seqs * width, num_kv_heads, VLLM_BLOCK_SIZE, 2 * head_size)
    cache = torch.randn(shape).to(query.dtype)
    if kv_cache_dtype == "fp8":
        cache = cache.to(torch.float8_e4m3fn).view(torch.uint8)
    table = torch.arange(num_seqs * width, dtype=torch.int32).view(num_seqs, width)
    isa = "vec" if head_size % 32 == 0 else "vec16"
    lengths, contexts = [count // num_seqs] * num_seqs, [context] * num_seqs
    run, _ = vllm_attention(
        query, cache, table, lengths, contexts, head_size**-0.5, isa, kv_cache_dtype
    )
    return run


def think_kernel(
    query: torch.Tensor,
    num_seqs: int,
    num_kv_heads: int,
    context: int,
    plan: BlockPlan,
    thin: bool,
) -> Callable[[], None]:
    """Set up our kernel over contexts whose full spans, up to the queries, are thin or dense."""
    count, _, head_size = query.shape
    queries = count // num_seqs
    width = -(-context // plan.block_size)
    shape = (num_seqs * width, num_kv_heads, plan.block_size, 2 * head_size)
    cache = torch.randn(shape).to(query.dtype)
    table = torch.arange(num_seqs * width, dtype=torch.int32).view(num_seqs, width)
    spans = plan.rule.prompt_spans(context - queries + 1) if thin else 0
    if spans:
        request = np.repeat(np.arange(num_seqs), spans)
        kept = [
            random_channels(number, num_seqs * spans, num_kv_heads, head_size)
            for number in (plan.key_channels, plan.value_channels)[: 1 + plan.prunes_values]
        ]
        channels = torch.cat(kept, dim=-1).to(torch.uint8)
        span = np.tile(np.arange(spans), num_seqs)
        compact_spans(cache, table, request, span, channels, plan)
    rows = DecodeRows(*rows_of(num_seqs, queries, context), np.full(count, spans, np.int32))
    out = torch.empty_like(query)

    def run() -> None:
        decode_attention(query, cache, table, rows, plan, head_size**-0.5, out)

    return run


def static_kernel(
    query: torch.Tensor,
    num_seqs: int,
    num_kv_heads: int,
    context: int,
    plan: StaticPlan,
) -> Callable[[], None]:
    """Set up our kernel over blocks that are thin from the first token on."""
    count, _, head_size = query.shape
    queries = count // num_seqs
    width = -(-context // plan.block_size)
    num_tokens = num_seqs * width * plan.block_size
    dtype = torch.uint8 if plan.is_quantized else query.dtype
    channels = plan.layout.token_bytes // dtype.itemsize
    cache = torch.empty(num_seqs * width, num_kv_heads, plan.block_size, channels, dtype=dtype)
    kept = StaticChannels(
        *(
            random_channels(number, num_kv_heads, head_size)
            for number in (plan.key_channels, plan.value_channels)
        )
    )
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_size).to(query.dtype)
    store_static(key, value, cache, torch.arange(num_tokens), kept, plan)
    table = torch.arange(num_seqs * width, dtype=torch.int32).view(num_seqs, width)
    request, lengths = rows_of(num_seqs, queries, context)
    out = torch.empty_like(query)

    def run() -> None:
        static_attention(query, cache, table, request, lengths, kept, plan, head_size**-0.5, out)

    return run


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
    count, shape = options.sequences, (options.kv_heads, options.context)
    query = torch.randn(count * options.queries, options.heads, options.head_size).to(dtype)
    kernels = {"vLLM": vllm_kernel(query, count, *shape)}
    kernels["vLLM, fp8 cache"] = vllm_kernel(query, count, *shape, "fp8")
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
                    kernels[title] = static_kernel(query, count, *shape, static)
            plan = plan_blocks(config, options.head_size, dtype.itemsize)
            if plan is None:
                continue
            title = f"{name}, {pruned} ({plan.span_blocks} blocks of {plan.block_size} -> "
            title += f"{plan.thin_blocks})"
            kernels[title] = think_kernel(query, count, *shape, plan, True)
            if name == "none":
                dense = think_kernel(query, count, *shape, plan, False)
                kernels[f"dense blocks of {plan.block_size}"] = dense
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
