"""Ask one configuration: a vLLM engine in a process of its own, led along the right answers."""

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from bench.tables.configurations import Configuration
from bench.tables.questions import ANSWER_TOKENS, Question, judge, questions
from bench.tables.results import Results, Row
from think_vllm import __version__
from think_vllm.errors import ThinkError
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.planner import plan_blocks
from think_vllm.plan.settings import flag_name
from think_vllm.tools.doctor.examination import run_probe
from think_vllm.tools.doctor.probe import ProbeJob

#: Enough for as many of the longest requests, dense, as run at once.
SEQUENCES, POOL_BYTES = 16, 128 * 2**20
PACKAGE = "think_vllm"


def ask(configuration: Configuration, results: Results) -> Row:
    """Start an engine, ask it everything, stop it.

    Raises:
        ThinkError: If the settings are refused, or the engine fails.
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
    # One process less to start; an engine answers the same in either.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    begin = time.monotonic()
    job = ProbeJob(
        arguments=engine_arguments(configuration),
        model=str(model),
        dense=False,
        prompts=[list(question.prompt) for _, question in asked],
        num_prompts=len(asked),
        prompt_tokens=max(len(question.prompt) for _, question in asked),
        new_tokens=ANSWER_TOKENS,
        forced=[list(question.answer) for _, question in asked],
        out=Path("result.json"),
    )
    result = run_probe(job)
    row = Row(
        group=configuration.group,
        labels=dict(configuration.labels),
        settings=dict(configuration.settings),
        dtype=configuration.dtype,
        code=code_version(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - begin, 1),
        plan=plan_facts(configuration, model, [question for _, question in asked]),
        answers={},
    )
    for (way, question), logprobs, likeliest in zip(
        asked, result.logprobs, result.likeliest, strict=True
    ):
        row.add(way, question, judge(question, logprobs, likeliest))
    return row


def engine_arguments(configuration: Configuration) -> list[str]:
    """As for ``vllm serve``."""
    arguments = ["--dtype", configuration.dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    arguments += ["--max-num-seqs", str(SEQUENCES), "--kv-cache-memory-bytes", str(POOL_BYTES)]
    return [*arguments, *flags(configuration)]


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
    """Refuse settings that are wrong.

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


def plan_facts(
    configuration: Configuration, model: Path, asked: Sequence[Question]
) -> dict[str, object]:
    """What tables say of a plan, and what the comparison with kvpress makes the same.

    Returns:
        Nothing without thin blocks.
    """
    if not configuration.settings:
        return {}
    if configuration.settings.get("kv_select") == "static":
        return {"thin_share": {question.length: 1.0 for question in asked}}
    head_size = json.loads((model / "config.json").read_text(encoding="utf-8"))["head_dim"]
    itemsize = getattr(torch, configuration.dtype).itemsize
    plan = plan_blocks(parse_config(configuration.settings), head_size, itemsize)
    assert plan is not None  # the engine has run with it
    thin: dict[int, list[float]] = {}
    for question in asked:
        tokens = len(question.prompt)
        share = plan.rule.prompt_spans(tokens) * plan.span_tokens / tokens
        thin.setdefault(question.length, []).append(share)
    return {
        "block_size": plan.block_size,
        "span_tokens": plan.span_tokens,
        "key_channels": plan.key_channels,
        "value_channels": plan.value_channels,
        "recent_window": plan.config.kv_recent_window,
        "kept_tokens": plan.kept_tokens if plan.config.evicts else None,
        "thin_share": {length: round(sum(x) / len(x), 3) for length, x in thin.items()},
    }


def code_version() -> str:
    """Name of what git has in the package's folder, and whether files differ from it."""
    try:
        tree = _git("rev-parse", "--short=12", f"HEAD:{PACKAGE}")
        return tree + ("+changes" if _git("status", "--porcelain", "--", PACKAGE) else "")
    except (OSError, subprocess.CalledProcessError):
        return __version__


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
