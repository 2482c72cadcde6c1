"""Exact match of recall answers over thin KV blocks, by ratio and format, on the real server.

Every configuration is a server of its own that answers the same held-out prompts over HTTP,
greedily, as users see it; policies follow, simulated (``quality_simulated.py``). Everything else
that can be chosen is in ``quality_tables.py``, led along the right answers.

vLLM computes the first output token in the step that ends the prompt, from dense blocks. So
prompts are sent without their final "?": the model says it first, and all four digits are
generated from thin blocks. Where it says something else first, the answer counts as wrong.

Columns: "thin" is the share of the prompt that was thin; "record thin" counts the prompts whose
record, all of it, was: the recent window and an unfinished span stay dense, and so easy. The
bundled model says nothing about real language models (models/README.md).
Run: ``python -m bench.quality``.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoConfig

from bench.exact_match import HEADER, Setting, table_row
from bench.machine import describe_machine
from bench.quality_simulated import SIMULATED_FORMATS, simulated_rows
from models.recipe.evaluate import POLICIES, SIZES
from tests.support.models import BUNDLED
from tests.support.server import Server
from think_vllm.plan.formats import FORMATS
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig
from think_vllm.tools.eval.recall import CODE_DIGITS, RecallSample, recall_samples

RATIOS = (0.0, 0.4, 0.5, 0.6)
ALL_RATIOS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
QUESTION_MARK = "?"
VLLM_FP8 = "vllm-fp8"


def served_settings() -> list[Setting]:
    """Plain vLLM, its fp8 cache, and every combination of ratio and format."""
    return [
        Setting("served", 0.0, "none", "think"),
        Setting("served", 0.0, VLLM_FP8, "think"),
        *(
            Setting("served", ratio, format_, "think")
            for ratio in ALL_RATIOS
            for format_ in FORMATS
            if ratio or format_ != "none"
        ),
    ]


def server_arguments(setting: Setting, group: int) -> list[str]:
    """Flags of one configuration."""
    if setting.format == VLLM_FP8:
        return ["--kv-cache-dtype", "fp8"]
    flags = ["--kv-channel-prune", f"{setting.ratio:g}"] if setting.ratio else []
    if setting.format != "none":
        flags += ["--kv-quant", setting.format]
    if FORMATS[setting.format].has_groups:
        flags += ["--kv-quant-group", str(group)]
    return flags


def plan_of(setting: Setting, options: argparse.Namespace) -> BlockPlan | None:
    """The plan that the server makes; None without blocks that become thin."""
    if setting.format == VLLM_FP8:
        return None
    config = ThinkConfig.model_validate(
        {
            "kv_channel_prune": setting.ratio,
            "kv_quant": setting.format,
            "kv_quant_group": options.group,
        }
    )
    head_size = AutoConfig.from_pretrained(options.model).head_dim
    return plan_blocks(config, head_size, getattr(torch, options.dtype).itemsize)


def served_row(
    setting: Setting, samples: Sequence[RecallSample], options: argparse.Namespace
) -> str:
    """Start a server, ask it everything, stop it."""
    arguments = ["--dtype", options.dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--max-num-seqs", str(options.concurrency)]
    arguments += server_arguments(setting, options.group)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(options.model, arguments, Path(folder) / "server.log") as server,
        ThreadPoolExecutor(options.concurrency) as pool,
    ):
        right = list(pool.map(lambda sample: is_right(server, sample), samples))
    plan = plan_of(setting, options)
    # The question mark is not part of the prompt that is sent.
    thin_tokens = [
        plan.rule.prompt_spans(sample.num_prompt_tokens - 1) * plan.span_tokens if plan else 0
        for sample in samples
    ]
    return table_row(setting, samples, thin_tokens, right)


def is_right(server: Server, sample: RecallSample) -> bool:
    """Send a prompt up to its question mark; return whether the digits after it are right."""
    prompt = sample.prompt.removesuffix(f" {QUESTION_MARK}")
    text = server.complete(prompt, 1 + CODE_DIGITS).text
    mark, _, digits = text.strip().partition(" ")
    return mark == QUESTION_MARK and sample.is_answered_by(digits)


def rows(samples: Sequence[RecallSample], options: argparse.Namespace) -> Iterator[str]:
    """Yield the rows that were asked for."""
    if "served" in options.only:
        for setting in served_settings():
            if setting.format in options.formats and setting.ratio in options.ratios:
                yield served_row(setting, samples, options)
    if "simulated" in options.only:
        formats = [name for name in SIMULATED_FORMATS if name in options.formats]
        settings = [
            Setting("simulated", ratio, format_, policy)
            for policy in POLICIES
            for ratio in options.ratios
            for format_ in formats
            if ratio  # without pruning there is nothing to choose
        ]
        yield from simulated_rows(options.model, options.dtype, samples, settings, options.group)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=200)
    # Training draws from an integer seed, recall_samples from a string that names the task: no
    # seed gives prompts of the training. 0 gives those of models/README.md.
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=SIZES[-1][0])
    parser.add_argument("--records", type=int, default=SIZES[-1][1])
    parser.add_argument("--group", type=int, default=32, help="--kv-quant-group")
    parser.add_argument("--concurrency", type=int, default=8, help="prompts at once")
    formats = [*FORMATS, VLLM_FP8]
    parser.add_argument("--ratios", nargs="+", type=float, choices=ALL_RATIOS, default=RATIOS)
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    kinds = ["served", "simulated"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    options = parser.parse_args()
    # As many threads as the servers' workers have: small matrices gain nothing from more.
    torch.set_num_threads(1)
    samples = list(recall_samples(options.seed, options.samples, options.tokens, options.records))
    print(describe_machine())
    print(f"`{shlex.join(['python', '-m', 'bench.quality', *sys.argv[1:]])}`")
    print(
        f"{options.samples} prompts of {options.tokens} tokens with {options.records} records, "
        f"{options.dtype}, groups of {options.group}, {options.model.name}\n"
    )
    print(HEADER)
    for row in rows(samples, options):
        print(row, flush=True)


if __name__ == "__main__":
    main()
