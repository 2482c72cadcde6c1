"""How many prefixes the same KV memory keeps: hit rates of a chat load with many system prompts.

More tenants than fit ask in random order, each with a system prompt of its own, a new question and
a short answer, a few at a time: vLLM's load generator with its ``prefix_repetition`` dataset. A
prefix is found if it has not been evicted since its tenant's last question, so the share of prompt
tokens that are hit follows the prefixes that fit. Rates are of the second half of the load, when
every cache is full; they count tokens and do not depend on the machine's pace.

"plan" is what the plan promises for this prefix: blocks of a prompt of its length, plain over thin.
Run: ``python -m bench.prefix_cache``.
"""

import argparse
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from bench.capacity import (
    CONFIGURATIONS,
    PLAIN,
    THIN_CONFIGURATIONS,
    VLLM_BLOCK_SIZE,
    VLLM_CONFIGURATIONS,
    cell,
    server_arguments,
)
from bench.machine import describe_machine
from tests.support.models import BUNDLED
from tests.support.server import Server
from think_vllm.plan.planner import plan_blocks
from think_vllm.tools.bench.driver import generator_arguments
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common import server as loadtest

HEADER = (
    "| server | hit rate | of plain | plan | questions | errors |\n"
    "| --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True)
class Rate:
    """Prompt tokens that were in the cache."""

    hits: float
    queries: float
    errors: float

    @property
    def share(self) -> float:
        """Of all prompt tokens."""
        return self.hits / self.queries


def measure(name: str, options: argparse.Namespace) -> Rate:
    """Start a server, fill its cache, count hits, stop it."""
    arguments = ["--dtype", options.dtype, "--enforce-eager"]
    arguments += ["--max-num-seqs", str(options.concurrency)]
    arguments += ["--max-model-len", str(options.prefix_len + 256), *server_arguments(name)]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(
            options.model,
            arguments,
            Path(folder) / "server.log",
            kv_cache_bytes=options.memory_mb * 10**6,
        )
        with server:
            errors = ask(server, options, seed=0)
            before = counters(server)
            errors += ask(server, options, seed=0)
            hits, queries = (b - a for a, b in zip(before, counters(server), strict=True))
            return Rate(hits, queries, errors)


def counters(server: Server) -> tuple[float, float]:
    """Tokens found in the prefix cache, and tokens looked for."""
    return tuple(  # type: ignore[return-value]
        server.metric(f"vllm:prefix_cache_{name}_total") for name in ("hits", "queries")
    )


def ask(server: Server, options: argparse.Namespace, seed: int) -> float:
    """Run vLLM's load generator in a process of its own; return how many requests failed."""
    questions = options.tenants * options.questions
    scenario = Scenario(
        name="tenants",
        description="Questions behind system prompts.",
        dataset="prefix_repetition",
        prompt_tokens=options.prefix_len + options.question_len,
        output_tokens=options.answer_len,
        prefix_tokens=options.prefix_len,
        num_prefixes=options.tenants,
        concurrency=(options.concurrency,),
        num_prompts=questions,
        prompts_per_place=1000,
    )
    point = LoadPoint(questions, concurrency=options.concurrency)
    arguments = generator_arguments(server.model, scenario, point, seed)
    with LoadGenerator() as generator:
        loaded = loadtest.Server(server.url, server.model)
        failed: float = generator.run(loaded, arguments)["failed"]
    return failed


def planned_ratio(name: str, options: argparse.Namespace) -> float | None:
    """Memory of a system prompt, plain over thin; None if vLLM makes no thin blocks."""
    if name in VLLM_CONFIGURATIONS:
        return None
    head_size = AutoConfig.from_pretrained(options.model).head_dim
    plan = plan_blocks(THIN_CONFIGURATIONS[name], head_size, getattr(torch, options.dtype).itemsize)
    assert plan is not None
    # The question and the answer behind are dense, and not found again.
    total = options.prefix_len + options.question_len + options.answer_len
    plain = -(-total // VLLM_BLOCK_SIZE) * VLLM_BLOCK_SIZE
    return plain / (plan.blocks_for(total) * plan.block_size)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory-mb", type=int, default=40)
    parser.add_argument("--tenants", type=int, default=160)
    parser.add_argument("--questions", type=int, default=3, help="of each tenant, per half")
    parser.add_argument("--prefix-len", type=int, default=1200)
    parser.add_argument("--question-len", type=int, default=40)
    parser.add_argument("--answer-len", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    options = parser.parse_args()
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.prefix_cache', *sys.argv[1:]])}`")
    print(
        f"{options.tenants} system prompts of {options.prefix_len} tokens, twice "
        f"{options.questions} questions each, {options.concurrency} at a time, "
        f"{options.memory_mb} MB of KV cache, {options.dtype}, {options.model.name}\n"
    )
    print(HEADER)
    plain: Rate | None = None
    for name in sorted(options.only, key=lambda name: name != PLAIN):
        planned, rate = planned_ratio(name, options), measure(name, options)
        plain = rate if name == PLAIN else plain
        ratio = rate.share / plain.share if plain else None
        cells = [name, f"{rate.share:.3f}", cell(ratio), cell(planned)]
        cells += [f"{2 * options.tenants * options.questions}", f"{rate.errors:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
