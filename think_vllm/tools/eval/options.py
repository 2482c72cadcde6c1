"""The command line of ``think-vllm eval``."""

import argparse
import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.flags import split_arguments
from think_vllm.tools.eval.tasks import TASKS
from think_vllm.tools.plan import positive_int

_DESCRIPTION = """
Ask OpenAI-compatible servers the same questions, greedily, and compare how many they answer right:
before a lossy option is turned on for good. Either servers that run (--base-url, twice or more to
compare), or a model that is served here with one set of flags after the other (--serve). Writes
report.md, results.json, answers.jsonl and plots. Exit status: 0, or 1 if requests failed, 2 for
wrong usage. OPENAI_API_KEY is sent if it is set.
"""


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ThinkError: If options contradict each other.
    """
    options = _parser().parse_args(list(arguments))
    if bool(options.base_url) == bool(options.serve):
        raise ThinkError("eval: give either --base-url URL, once or more, or --serve MODEL")
    if options.base_url:
        for_serve = {"--config": options.config, "--server-args": options.server_args}
        for flag, value in for_serve.items():
            if value:
                raise ThinkError(f"eval: {flag} is for --serve; these servers run already")
    if not (options.tasks or options.harness):
        options.tasks = [name for name, task in TASKS.items() if task.english]
    options.server_arguments = split_arguments(options.server_args, "eval: --server-args")
    options.harness_arguments = split_arguments(options.harness_args, "eval: --harness-args")
    options.extra = _extra(options.extra_body)
    return options


def _extra(text: str) -> dict[str, Any]:
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise ThinkError(f"eval: --extra-body {text!r} is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ThinkError(f"eval: --extra-body {text!r} is no JSON object")
    return extra


def _depth(text: str) -> float:
    try:
        depth = float(text) / 100
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage, 0 to 100")
    return depth


def _parser() -> argparse.ArgumentParser:
    kinds = "\n".join(f"  {name:<15} {task.summary}" for name, task in TASKS.items())
    parser = argparse.ArgumentParser(
        prog="think-vllm eval",
        description=_DESCRIPTION,
        epilog=f"tasks (the last three are for the bundled model only):\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    yes_or_no: dict[str, Any] = {"action": argparse.BooleanOptionalAction, "default": True}
    several: dict[str, Any] = {"action": "append", "default": []}
    listed: dict[str, Any] = {"nargs": "+", "default": []}
    number: dict[str, Any] = {"type": positive_int, "metavar": "N"}

    add = parser.add_argument_group("servers").add_argument
    add("--base-url", **several, help="A server that runs; the first is the reference.")
    add("--serve", metavar="MODEL", help="Serve this model here, one set of flags after the other.")
    text = "Flags of a server, in quotes; a single one as --config=--FLAG."
    add("--config", **several, metavar="FLAGS", help=text)
    text = "With --serve, begin with a server without flags. Default: yes."
    add("--plain", **yes_or_no, help=text)
    text = "With --serve, flags of all servers, in quotes."
    add("--server-args", default="", metavar="FLAGS", help=text)
    text = "Seconds of a start. Default: 600."
    add("--start-timeout", dest="start_timeout_s", default=600, **number, help=text)
    add("--label", **several, help="Name of each --base-url or --config.")
    add("--model", help="Name that the servers give the model. Default: the only one.")
    add("--chat", action="store_true", help="Ask as chat messages, with the model's template.")
    text = "Further fields of every request."
    add("--extra-body", default="{}", metavar="JSON", help=text)
    add("--tokenizer", help="Name or directory. Default: the server's /tokenize.")

    add = parser.add_argument_group("questions").add_argument
    add("--tasks", **listed, metavar="TASK", help="Default: all in English, see below.")
    text = "Of prompt and answer. Default: 1/4, 1/2 and all of the context, up to 32768."
    add("--lengths", **listed, type=positive_int, metavar="TOKENS", help=text)
    text = "Where facts are hidden. Default: 0 25 50 75 100."
    depths = (0.0, 0.25, 0.5, 0.75, 1.0)
    add("--depths", nargs="+", type=_depth, default=depths, metavar="PERCENT", help=text)
    add("--samples", default=20, **number, help="Questions of a cell. Default: 20.")
    add("--seed", type=int, default=0, help="Default: 0.")
    add("--max-tokens", **number, help="Of an answer. Default: the task's.")
    add("--haystack", type=Path, help="Text to hide facts in. Default: generated sentences.")
    text = "Tasks of lm-evaluation-harness, with commas, such as ruler or longbench."
    add("--harness", metavar="TASKS", help=text)
    text = "Further arguments of lm_eval, in quotes."
    add("--harness-args", default="", metavar="ARGS", help=text)

    add = parser.add_argument_group("run").add_argument
    add("--concurrency", default=8, **number, help="Requests at once. Default: 8.")
    text = "Seconds of a request. Default: 600."
    add("--timeout", dest="timeout_s", default=600, **number, help=text)
    out = Path("results") / f"eval-{datetime.now():%Y%m%d-%H%M%S}"
    text = "Directory of the report. Default: results/eval-DATE."
    add("--out", type=Path, default=out, metavar="DIR", help=text)
    text = "Draw heat maps and bars (needs matplotlib). Default: yes."
    add("--plots", **yes_or_no, help=text)
    return parser
