"""Ask one configuration: a vLLM engine in a process of its own, led along the right answers."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice
from pathlib import Path

import torch

from bench.support.repository import git
from bench.tables.configurations import Configuration
from bench.tables.questions import ANSWER_TOKENS, Question, judge, other_prompt, questions
from bench.tables.results import Results, Row
from think_vllm import __version__
from think_vllm.errors import ThinkError
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.planner import plan_blocks
from think_vllm.plan.settings import flag_name
from think_vllm.tools.common.machine import now
from think_vllm.tools.doctor.examination import run_probe
from think_vllm.tools.doctor.probe import ProbeJob

#: Enough for as many of the longest requests, dense, as run at once.
SEQUENCES, POOL_BYTES = 16, 128 * 2**20
DTYPE = "bfloat16"
#: Of prompts that are to find their prefix in the cache: all but the question and a block.
LEAST_HIT = 0.8
PACKAGE = "think_vllm"


def ask(configuration: Configuration, results: Results) -> Row:
    """Start an engine, ask it everything, stop it.

    Raises:
        ThinkError: If the settings are rejected, or the engine fails.
    """
    model = Path(results.model)
    check(configuration)
    if "kv_channel_tables_file" in configuration.settings:
        calibrate(model, Path(configuration.settings["kv_channel_tables_file"]))
    asked = [
        (way, question)
        for way in configuration.ways
        for question in questions(way, results.seed, results.samples)
    ]
    order = in_order(len(asked), configuration.hits)
    prompts = [
        asked[place][1].prompt if counts else other_prompt(asked[place][1])
        for place, counts in order
    ]
    # One process less to start; an engine answers the same in either.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    begin = time.monotonic()
    job = ProbeJob(
        arguments=engine_arguments(configuration),
        model=str(model),
        dense=False,
        prompts=[list(prompt) for prompt in prompts],
        num_prompts=len(prompts),
        prompt_tokens=max(map(len, prompts)),
        new_tokens=ANSWER_TOKENS,
        forced=[list(asked[place][1].answer) for place, _ in order],
        out=Path("result.json"),
    )
    result = run_probe(job)
    row = Row(
        group=configuration.group,
        labels=dict(configuration.labels),
        settings=dict(configuration.settings),
        code=code_version(),
        date=now(),
        seconds=round(time.monotonic() - begin, 1),
        thin_share=thin_share(configuration, model, [question for _, question in asked]),
    )
    found = 0
    for at, (place, counts) in enumerate(order):
        if counts:
            way, question = asked[place]
            answer = judge(question, result.logprobs[at], result.likeliest[at])
            row.add(way, question, answer)
            found += result.cached_tokens[at]
    if configuration.hits:
        row.hit_share = round(found / sum(len(question.prompt) for _, question in asked), 3)
        if row.hit_share < LEAST_HIT:
            raise ThinkError(f"{configuration.name}: only {row.hit_share} of prompts was hit")
    return row


def in_order(count: int, hits: bool) -> list[tuple[int, bool]]:
    """Which question's prompt comes when, and whether its answer counts.

    With hits, as many prompts as run at once leave their prefixes first, some of them twice if need
    be: none is asked while its prefix is computed.
    """
    if not hits:
        return [(place, True) for place in range(count)]
    order: list[tuple[int, bool]] = []
    for first in range(0, count, SEQUENCES):
        places = range(first, min(first + SEQUENCES, count))
        order += [(place, False) for place in islice(cycle(places), SEQUENCES)]
        order += [(place, True) for place in places]
    return order


def engine_arguments(configuration: Configuration) -> list[str]:
    """As for ``vllm serve``."""
    caching = "--enable-prefix-caching" if configuration.hits else "--no-enable-prefix-caching"
    arguments = ["--dtype", DTYPE, "--enforce-eager", caching]
    arguments += ["--max-num-seqs", str(SEQUENCES), "--kv-cache-memory-bytes", str(POOL_BYTES)]
    return [*arguments, *flags(configuration), *configuration.arguments]


def flags(configuration: Configuration) -> list[str]:
    """Flags of the settings."""
    given = []
    for name, value in configuration.settings.items():
        flag = flag_name(name)
        if isinstance(value, bool):
            given.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            given += [flag, str(value)]
    return given


def check(configuration: Configuration) -> None:
    """Reject settings that are wrong.

    Raises:
        ThinkError: If they are, or if this version does not know them.
    """
    if configuration.settings:
        parse_config(configuration.settings)


@cache  # one file serves all ratios
def calibrate(model: Path, path: Path) -> None:
    """Rank channels over prompts of the same kind that nobody is asked.

    Raises:
        ThinkError: If the command fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "think_vllm.tools.cli", "calibrate", str(model)]
    done = subprocess.run(
        [*command, "--task", "recall", "--out", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ThinkError(f"{path}: think-vllm calibrate failed: {done.stderr[-500:]}")


def thin_share(
    configuration: Configuration, model: Path, asked: Sequence[Question]
) -> dict[int, float]:
    """Mean share of prompts that was thin, by size; nothing without thin blocks."""
    if not configuration.settings:
        return {}
    if configuration.settings.get("kv_select") == "static":
        return {question.length: 1.0 for question in asked}
    head_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["head_dim"]
    itemsize = getattr(torch, DTYPE).itemsize
    plan = plan_blocks(parse_config(configuration.settings), head_size, itemsize)
    assert plan is not None  # the engine has run with it
    thin: dict[int, list[float]] = {}
    for question in asked:
        tokens = len(question.prompt)
        share = plan.rule.prompt_spans(tokens) * plan.span_tokens / tokens
        thin.setdefault(question.length, []).append(share)
    return {length: round(statistics.fmean(shares), 3) for length, shares in thin.items()}


def code_version() -> str:
    """Name of what git has in the package's folder, and whether files differ from it."""
    tree = git("rev-parse", "--short=12", f"HEAD:{PACKAGE}")
    if not tree:
        return __version__
    return tree + ("+changes" if git("status", "--porcelain", "--", PACKAGE) else "")
