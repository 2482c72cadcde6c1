"""What the end of a prompt costs in one layer, beside vLLM's attention over that prompt.

Attention is only part of a prefill, so the share printed is an upper bound. With ``--evict``
tokens are chosen and packed as well; h2o scores the whole prompt.
Run: ``python -m bench.compaction``.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from bench.support.turns import take_turns, timed
from bench.support.vllm_kernel import vllm_attention
from think_vllm.kernels.cpu.compaction import compact_spans
from think_vllm.kernels.cpu.scoring import add_query_energy, key_energy
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.tools.common.machine import this_machine
from think_vllm.worker.channel_selection import Chooser, top_channels
from think_vllm.worker.cpu.eviction import CPUEvictor
from think_vllm.worker.eviction_step import Pack, Watched
from think_vllm.worker.policies import LayerHeads


class EndOfPrompt:
    """Scores, choice and compaction of one prompt in one layer."""

    def __init__(self, tokens: int, heads: int, kv_heads: int, plan: BlockPlan) -> None:
        width = -(-tokens // plan.block_size)
        shape = (width, kv_heads, plan.block_size, 2 * plan.head_size)
        self.cache = torch.randn(shape).bfloat16()
        self.table = torch.arange(width, dtype=torch.int32).view(1, -1)
        self.query = torch.randn(tokens, heads, plan.head_size).bfloat16()
        self.tokens, self.kv_heads, self.plan = tokens, kv_heads, plan

    def run(self) -> None:
        """The work of ``ThinkCPUImpl`` at a prompt's end."""
        plan = self.plan
        energy = torch.zeros(self.kv_heads, plan.head_size)
        add_query_energy(self.query, self.tokens - 32, self.tokens, energy)
        first = np.zeros(1, np.int32)
        keys = key_energy(self.cache, self.table, first, first + self.tokens, plan)
        channels = top_channels(energy * keys, plan.key_channels)
        span = np.arange(plan.rule.prompt_spans(self.tokens), dtype=np.int32)
        many = channels.expand(span.size, -1, -1)
        compact_spans(self.cache, self.table, span * 0, span, many, plan)


class EvictedPrompt(EndOfPrompt):
    """Scores and choice of tokens and channels, and packing, of one prompt in one layer."""

    def run(self) -> None:
        """The work of ``ThinkCPUImpl`` at a prompt's end and in the step behind it."""
        plan, tokens, rule = self.plan, self.tokens, self.plan.rule
        energy = torch.zeros(self.kv_heads, plan.head_size)
        add_query_energy(self.query, tokens - 32, tokens, energy)
        first = tokens - 32 if plan.config.kv_evict == "snapkv" else 0
        evictor = CPUEvictor(plan, plan.head_size**-0.5, 0.0, None)
        assert rule.budget_spans is not None
        seen = Watched("one", 0, first, tokens, first, tokens, rule.budget_spans, True)
        evictor.watch(self.query, self.cache, self.table, [seen], {0: energy[None]}, {"one"})
        pack = Pack("one", 0, tokens, rule.evicted_spans(tokens), rule.budget_spans)
        chooser = Chooser(plan, LayerHeads(0, 0, self.kv_heads, plan.head_size))
        evictor.pack(self.cache, self.table, [pack], chooser)


def prompt_attention(query: torch.Tensor, kv_heads: int) -> Callable[[], None]:
    """Set up vLLM's attention over the same prompt."""
    tokens, _, head_size = query.shape
    width = -(-tokens // 128)
    cache = torch.randn(width, kv_heads, 128, 2 * head_size).bfloat16()
    table = torch.arange(width, dtype=torch.int32).view(1, -1)
    run, _ = vllm_attention(query, cache, table, [tokens], [tokens], head_size**-0.5, "vec")
    return run


def main() -> None:
    """Print medians and the median share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--evict", default="none", choices=["none", "snapkv", "h2o"])
    parser.add_argument("--budget", type=int, default=512, help="--kv-evict-budget, with --evict")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's time, for a machine that is busy"
    )
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    clock = time.perf_counter
    if options.cpu_time:
        # Before there are threads that wait for work by spinning.
        torch.set_num_threads(1)
        clock = time.process_time
    config = ThinkConfig(
        kv_channel_prune=options.ratio, kv_evict=options.evict, kv_evict_budget=options.budget
    )
    plan = plan_blocks(config, 128, 2)
    if plan is None:
        parser.error("--ratio prunes nothing")
    if config.evicts and not plan.rule.evicted_spans(options.tokens):
        parser.error("--budget evicts nothing of a prompt of so many --tokens")
    end = (EvictedPrompt if config.evicts else EndOfPrompt)(
        options.tokens, options.heads, options.kv_heads, plan
    )
    attention = prompt_attention(end.query, options.kv_heads)
    runs = {"end": timed(end.run, clock), "attention": timed(attention, clock)}
    times = take_turns(runs, options.rounds)
    print(this_machine())
    print(
        f"{options.tokens} tokens, {options.heads}/{options.kv_heads} heads of 128, bf16, evict "
        f"{options.evict}: end of prompt {1e3 * times.median('end'):.2f} ms, vLLM's attention "
        f"{1e3 * times.median('attention'):.1f} ms, share "
        f"{100 * times.ratio('end', 'attention'):.1f} %"
    )


if __name__ == "__main__":
    main()
