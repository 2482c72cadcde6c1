"""lm-evaluation-harness against a server, through its own client for OpenAI's API.

It runs as a program, as its packages and vLLM's need not agree. Tasks that compare the likelihood
of given answers are scored in the pass over the prompt, before anything is compacted: they cannot
show what thin blocks cost, and the report says so. Tasks that generate can.
"""

import json
import math
import shlex
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.client import ServedModel
from think_vllm.tools.common.process import ProcessGroup
from think_vllm.tools.eval.stats import NORMAL_95, Estimate

PROGRAM = "lm_eval"
LOG_FILE = "lm_eval.log"
#: With the packages that its RULER and LongBench tasks need.
INSTALL = "pip install 'lm-eval[api,ruler,longbench]'"


@dataclass(frozen=True)
class HarnessLine:
    """One metric of a task."""

    task: str  # its name there
    metric: str  # its name there, with the filter of answers
    estimate: Estimate  # value, and 1.96 standard errors on either side if it has some
    generates: bool  # whether the task generates text


@dataclass(frozen=True)
class HarnessTable:
    """Its results on one server."""

    label: str  # the server's
    command: str  # what was run
    lines: list[HarnessLine]  # its metrics


def find_harness() -> str:
    """Path of the program: beside this interpreter, else where the shell finds it.

    Raises:
        ThinkError: If it is not installed.
    """
    beside = Path(sys.executable).parent / PROGRAM
    path = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    if path is None:
        raise ThinkError(
            f"eval: --harness needs lm-evaluation-harness, and there is no program {PROGRAM} "
            f"beside {sys.executable} nor on PATH; {INSTALL} (in an environment of its own, whose "
            "bin directory you put on PATH, if it disagrees with vLLM's packages)"
        )
    return path


def harness_command(
    program: str, url: str, model: ServedModel, output: Path, options: Namespace
) -> list[str]:
    """Program and arguments for one server.

    Args:
        program: As `find_harness` returns it.
        url: Of the server, without a path.
        model: Of the server.
        output: Directory of its results.
        options: Of the evaluation. A tokenizer is needed by tasks that compare likelihoods, and
            by those that size their prompts, as RULER's do with the lengths.

    Raises:
        ThinkError: If a name would be read as several arguments.
    """
    settings = {
        "model": model.name,
        "base_url": f"{url}/v1/chat/completions" if options.chat else f"{url}/v1/completions",
        "num_concurrent": str(options.concurrency),
        "tokenized_requests": "False",
        "tokenizer_backend": "None" if options.tokenizer is None else "huggingface",
    }
    if options.tokenizer is not None:
        settings["tokenizer"] = options.tokenizer
    if model.max_model_len is not None:
        settings["max_length"] = str(model.max_model_len)
    for name, value in settings.items():
        if "," in value or "=" in value:
            raise ThinkError(
                f"eval: --harness: {name} is {value!r}; {PROGRAM} splits its arguments at commas "
                "and equal signs, so serve under another name (--served-model-name)"
            )
    client = "local-chat-completions" if options.chat else "local-completions"
    command = [program, "--model", client, "--tasks", str(options.harness)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in settings.items())]
    command += ["--output_path", str(output), "--log_samples"]
    command += ["--apply_chat_template"] if options.chat else []
    if options.lengths:
        command += ["--metadata", json.dumps({"max_seq_lengths": options.lengths})]
    return [*command, *options.harness_arguments]


def run_harness(
    program: str, url: str, model: ServedModel, label: str, output: Path, options: Namespace
) -> HarnessTable:
    """Run it and read its results.

    Raises:
        ThinkError: If it fails, or leaves no results.
    """
    command = harness_command(program, url, model, output, options)
    output.mkdir(parents=True, exist_ok=True)
    with ProcessGroup(command, output / LOG_FILE) as group:
        if status := group.wait():
            raise ThinkError(
                f"eval: --harness: {shlex.join(command)} ended with status {status}; the end of "
                f"{group.log}:\n{group.log_tail()}"
            )
    files = sorted(output.rglob("results_*.json"))
    if not files:
        raise ThinkError(f"eval: --harness: {PROGRAM} left no results_*.json in {output}")
    results = json.loads(files[-1].read_text(encoding="utf-8"))
    return HarnessTable(label, shlex.join(command), list(_lines(results)))


def _lines(results: dict[str, Any]) -> Iterator[HarnessLine]:
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            # Keys are `metric,filter` and `metric_stderr,filter`; others describe the task.
            metric, comma, filters = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # RULER's metrics are lengths, and -1 where no prompt has one.
            if metric.isdecimal() and value < 0:
                continue
            error = metrics.get(f"{metric}_stderr,{filters}")
            # At 0 and 1 all samples are equal: an interval of no width would be a lie.
            known = isinstance(error, int | float) and math.isfinite(error) and error > 0
            margin = NORMAL_95 * error if known else None
            yield HarnessLine(
                task,
                f"{metric} ({filters})",
                Estimate(
                    float(value),
                    None if margin is None else value - margin,
                    None if margin is None else value + margin,
                    "normal",
                ),
                _generates(task, results),
            )


def _generates(task: str, results: dict[str, Any]) -> bool:
    """Whether a task, or each of a group's, generates text."""
    if members := results.get("group_subtasks", {}).get(task):
        return all(_generates(member, results) for member in members)
    kind: str = results.get("configs", {}).get(task, {}).get("output_type", "")
    return kind.startswith("generate")
