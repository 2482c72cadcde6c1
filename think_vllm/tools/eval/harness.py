"""lm-evaluation-harness against a server, through its own client for OpenAI's API.

It runs as a program, as its packages and vLLM's need not agree. Tasks that compare the likelihood
of given answers are scored in the pass over the prompt, before anything is compacted: they cannot
show what thin blocks cost, and the report says so. Tasks that generate can.
"""

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.stats import NORMAL_95, Estimate

PROGRAM = "lm_eval"
LOG_FILE = "lm_eval.log"
#: Of the log of a run that failed, in its error.
_TAIL_LINES = 20
INSTALL = "pip install 'lm-eval[api]'"


@dataclass(frozen=True)
class HarnessLine:
    """One metric of a task.

    Args:
        task: Its name there.
        metric: Its name there, with the filter of answers.
        estimate: Value, and 1.96 standard errors on either side if it has some.
        generates: Whether the task generates text.
    """

    task: str
    metric: str
    estimate: Estimate
    generates: bool


@dataclass(frozen=True)
class HarnessTable:
    """What it found on one server.

    Args:
        label: The server's.
        command: What was run.
        lines: Its metrics.
    """

    label: str
    command: str
    lines: list[HarnessLine]


def find_harness() -> str:
    """Path of the program: beside this interpreter, else where the shell finds it.

    Raises:
        ThinkError: If it is not installed.
    """
    beside = Path(sys.executable).parent / PROGRAM
    found = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    if found is None:
        raise ThinkError(
            f"eval: --harness needs lm-evaluation-harness, and there is no program {PROGRAM} "
            f"beside {sys.executable} nor on PATH; {INSTALL} (in an environment of its own, whose "
            "bin directory you put on PATH, if it disagrees with vLLM's packages)"
        )
    return found


def harness_command(
    program: str,
    url: str,
    model: str,
    tasks: str,
    output: Path,
    *,
    chat: bool,
    concurrency: int,
    tokenizer: str | None,
    max_model_len: int | None,
    further: Sequence[str] = (),
) -> list[str]:
    """Program and arguments for one server.

    Args:
        program: As `find_harness` returns it.
        url: Of the server, without a path.
        model: Name that requests carry.
        tasks: Its names, with commas between them.
        output: Directory of its results.
        chat: Whether to ask as chat messages.
        concurrency: Requests at the same time.
        tokenizer: Name or directory; tasks that compare likelihoods need one.
        max_model_len: Tokens of a request; None for the harness's own idea.
        further: Arguments that are passed on.

    Raises:
        ThinkError: If a name would be read as several arguments.
    """
    client = "local-chat-completions" if chat else "local-completions"
    given = {
        "model": model,
        "base_url": f"{url}/v1/chat/completions" if chat else f"{url}/v1/completions",
        "num_concurrent": str(concurrency),
        "tokenized_requests": "False",
        "tokenizer_backend": "None" if tokenizer is None else "huggingface",
    }
    if tokenizer is not None:
        given["tokenizer"] = tokenizer
    if max_model_len is not None:
        given["max_length"] = str(max_model_len)
    for name, value in given.items():
        if "," in value or "=" in value:
            raise ThinkError(
                f"eval: --harness: {name} is {value!r}; {PROGRAM} splits its arguments at commas "
                "and equal signs, so serve under another name (--served-model-name)"
            )
    command = [program, "--model", client, "--tasks", tasks]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    command += ["--output_path", str(output), "--log_samples"]
    return [*command, *(["--apply_chat_template"] if chat else []), *further]


def run_harness(command: Sequence[str], label: str, output: Path) -> HarnessTable:
    """Run it and read what it found.

    Args:
        command: As `harness_command` makes it.
        label: The server's.
        output: Directory of its results and its log; new.

    Raises:
        ThinkError: If it fails, or leaves no results.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / LOG_FILE
    with path.open("wb") as log:
        finished = subprocess.run(
            command, check=False, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    if finished.returncode:
        tail = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        raise ThinkError(
            f"eval: --harness: {shlex.join(command)} ended with status {finished.returncode}; the "
            f"end of {path}:\n" + "\n".join(tail)
        )
    files = sorted(output.rglob("results_*.json"))
    if not files:
        raise ThinkError(f"eval: --harness: {PROGRAM} left no results_*.json in {output}")
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    return HarnessTable(label, shlex.join(command), list(_lines(found)))


def _lines(found: dict[str, Any]) -> Iterator[HarnessLine]:
    for task, metrics in found["results"].items():
        kind = found.get("configs", {}).get(task, {}).get("output_type", "")
        for name, value in metrics.items():
            # Keys are `metric,filter` and `metric_stderr,filter`; others describe the task.
            metric, comma, filters = name.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
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
                kind.startswith("generate"),
            )
