"""Exact match of recall answers where old tokens are evicted, on the real server.

A prompt of 2k tokens keeps a budget of old tokens per KV head; records that are gone cannot be
recalled. Every row is a server of its own that is asked everything twice:

* "asked": the whole prompt. Its last query, "?", looks the record up, and snapkv sees that; the
  first digit comes from dense blocks, as every first token does.
* "unasked": without the "?", which the model then says itself (``bench/quality.py``). No query of
  the prompt looks the record up.

Run: ``python -m bench.quality_eviction``.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoConfig

from bench.exact_match import wilson_interval
from bench.machine import describe_machine
from bench.quality import is_right
from models.recipe.evaluate import SIZES
from tests.support.models import BUNDLED
from tests.support.server import Server
from think_vllm.budget import kept_tokens
from think_vllm.config import ThinkConfig
from think_vllm.evals.recall import CODE_DIGITS, RecallSample, recall_samples
from think_vllm.planner import plan_blocks

METHODS = ("snapkv", "h2o")
BUDGETS = (256, 512, 1024)
RATIOS = (0.0, 0.4)


def row(
    method: str,
    budget: int,
    ratio: float,
    samples: Sequence[RecallSample],
    options: argparse.Namespace,
) -> str:
    """Start a server, ask it everything, stop it."""
    given = {"kv_evict": method, "kv_evict_budget": budget, "kv_channel_prune": ratio}
    head_size = AutoConfig.from_pretrained(options.model).head_dim
    itemsize = getattr(torch, options.dtype).itemsize
    plan = plan_blocks(ThinkConfig.model_validate(given), head_size, itemsize)
    assert plan is not None
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value]
    arguments = ["--dtype", options.dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--max-num-seqs", str(options.concurrency), *flags]
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(options.model, arguments, Path(folder) / "server.log") as server,
        ThreadPoolExecutor(options.concurrency) as pool,
    ):
        unasked = sum(pool.map(lambda sample: is_right(server, sample), samples))
        asked = sum(pool.map(lambda sample: is_right_asked(server, sample), samples))
    length = samples[0].num_prompt_tokens
    held = plan.blocks_for(length) * plan.block_size / length
    cells = [method, str(budget), str(kept_tokens(plan)), f"{ratio:g}", f"{held:.2f}"]
    for right in (asked, unasked):
        low, high = wilson_interval(right, len(samples))
        cells.append(f"{right / len(samples):.3f} ({low:.3f} to {high:.3f})")
    return f"| {' | '.join(cells)} |"


def is_right_asked(server: Server, sample: RecallSample) -> bool:
    """Send a whole prompt; return whether the digits after it are right."""
    return sample.is_answered_by(server.complete(sample.prompt, CODE_DIGITS).text)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=SIZES[-1][0])
    parser.add_argument("--records", type=int, default=SIZES[-1][1])
    parser.add_argument("--concurrency", type=int, default=8, help="prompts at once")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    options = parser.parse_args()
    samples = list(recall_samples(options.seed, options.samples, options.tokens, options.records))
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.quality_eviction', *sys.argv[1:]])}`")
    print(
        f"{options.samples} prompts of {options.tokens} tokens with {options.records} records, "
        f"{options.dtype}, {options.model.name}\n"
    )
    print("| kept by | budget | kept | pruned | blocks held, of dense | asked | unasked |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for method in options.methods:
        for budget in options.budgets:
            for ratio in options.ratios:
                print(row(method, budget, ratio, samples, options), flush=True)


if __name__ == "__main__":
    main()
