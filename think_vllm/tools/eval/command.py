"""``think-vllm eval``: the quality of served models, against each other on the same prompts."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.interrupts import Interrupted, interruptible
from think_vllm.tools.eval.evaluation import Evaluation, Options
from think_vllm.tools.eval.target import running_targets, split_arguments, started_targets
from think_vllm.tools.eval.tasks import TASKS
from think_vllm.tools.eval.tasks.longbench import FILE_METRICS
from think_vllm.tools.plan import positive_int

_DESCRIPTION = """
Ask OpenAI-compatible servers the same questions, greedily, and compare how many they answer right:
before a lossy option is turned on for good. Either servers that run (--base-url, twice or more to
compare), or a model that is served here with one set of flags after the other (--serve). Writes
report.md, results.json, answers.jsonl and plots. Exit status: 0, or 1 if requests failed, 2 for
wrong usage. OPENAI_API_KEY is sent if it is set.
"""
_DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)


def evaluate(arguments: Sequence[str]) -> int:
    """Run an evaluation; return its exit status.

    Raises:
        ThinkError: If it cannot be run as asked.
    """
    parser = _parser()
    namespace = parser.parse_args(list(arguments))
    evaluation = Evaluation(_options(namespace), list(arguments))
    try:
        with interruptible():
            failed = evaluation.run()
    except Interrupted as interrupted:
        print(f"eval: {interrupted}; nothing is left running", file=sys.stderr)
        return 128 + interrupted.number
    print((evaluation.options.out / "report.md").read_text(encoding="utf-8"), end="")
    print(f"\nWritten to {evaluation.options.out}", file=sys.stderr)
    if failed:
        print(f"eval: {failed} requests failed; {evaluation.answers} says why", file=sys.stderr)
    return 1 if failed else 0


def _options(given: argparse.Namespace) -> Options:
    if bool(given.base_url) == bool(given.serve):
        raise ThinkError("eval: give either --base-url URL, once or more, or --serve MODEL")
    if given.base_url:
        for name in ("config", "server_args"):
            if getattr(given, name):
                flag = name.replace("_", "-")
                raise ThinkError(f"eval: --{flag} is for --serve; these servers run already")
        targets = running_targets(given.base_url, given.label)
    else:
        targets = started_targets(given.config, given.plain, given.label)
    if not (given.tasks or given.jsonl or given.harness):
        given.tasks = [name for name, task in TASKS.items() if task.english]
    return Options(
        targets=targets,
        serve=given.serve,
        server_arguments=split_arguments(given.server_args or "", "--server-args"),
        start_timeout_s=given.start_timeout,
        model=given.model,
        chat=given.chat,
        extra=_extra(given.extra_body),
        tokenizer=given.tokenizer,
        tasks=given.tasks,
        lengths=given.lengths,
        depths=[depth / 100 for depth in given.depths],
        samples=given.samples,
        seed=given.seed,
        haystack=given.haystack,
        jsonl=given.jsonl,
        jsonl_metric=given.jsonl_metric,
        longbench_config=given.longbench_config,
        limit=given.limit,
        harness=given.harness,
        harness_arguments=split_arguments(given.harness_args or "", "--harness-args"),
        max_tokens=given.max_tokens,
        concurrency=given.concurrency,
        timeout_s=given.timeout,
        plots=given.plots,
        out=given.out or Path("results") / f"eval-{datetime.now():%Y%m%d-%H%M%S}",
    )


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        extra = json.loads(text)
    except ValueError as error:
        raise ThinkError(f"eval: --extra-body {text!r} is no JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ThinkError(f"eval: --extra-body {text!r} is no JSON object")
    return extra


def _depth(text: str) -> float:
    try:
        depth = float(text)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 100:
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
    _add_servers(parser.add_argument_group("servers"))
    _add_questions(parser.add_argument_group("questions"))
    add = parser.add_argument_group("run").add_argument
    add("--concurrency", type=positive_int, default=8, help="Requests at once. Default: 8.")
    add("--timeout", type=positive_int, default=600, help="Seconds of a request. Default: 600.")
    add("--out", type=Path, help="Directory of the report. Default: results/eval-DATE.")
    add(
        "--plots",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Draw heat maps and bars (needs matplotlib). Default: yes.",
    )
    return parser


def _add_servers(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--base-url",
        action="append",
        default=[],
        help="A server that runs; the first is the reference.",
    )
    add("--serve", metavar="MODEL", help="Serve this model here, one set of flags after the other.")
    add(
        "--config",
        action="append",
        default=[],
        metavar="FLAGS",
        help="Flags of a server, in quotes; a single one as --config=--FLAG.",
    )
    add(
        "--plain",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="With --serve, begin with a server without flags. Default: yes.",
    )
    add("--server-args", metavar="FLAGS", help="With --serve, flags of all servers, in quotes.")
    add("--start-timeout", type=positive_int, default=600, help="Seconds of a start. Default: 600.")
    add("--label", action="append", default=[], help="Name of each --base-url or --config.")
    add("--model", help="Name that the servers give the model. Default: the only one.")
    add("--chat", action="store_true", help="Ask as chat messages, with the model's template.")
    add("--extra-body", metavar="JSON", help="Further fields of every request.")
    add("--tokenizer", help="Name or directory. Default: the server's /tokenize.")


def _add_questions(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--tasks", nargs="+", default=[], metavar="TASK", help="Default: all in English, see below."
    )
    add(
        "--lengths",
        nargs="+",
        type=positive_int,
        default=[],
        metavar="TOKENS",
        help="Of prompt and answer. Default: 1/4, 1/2 and all of the context, up to 32768.",
    )
    add(
        "--depths",
        nargs="+",
        type=_depth,
        default=_DEPTHS,
        metavar="PERCENT",
        help="Default: 0 25 50 75 100.",
    )
    add("--samples", type=positive_int, default=20, help="Questions of a cell. Default: 20.")
    add("--seed", type=int, default=0, help="Default: 0.")
    add("--max-tokens", type=positive_int, help="Of an answer. Default: the task's.")
    add("--haystack", type=Path, help="Text to hide facts in. Default: made-up sentences.")
    add(
        "--jsonl",
        action="append",
        default=[],
        type=Path,
        help="A file of questions in LongBench's form.",
    )
    add(
        "--jsonl-metric",
        choices=FILE_METRICS,
        default="f1",
        help="Of sets LongBench lacks. Default: f1.",
    )
    add("--longbench-config", type=Path, help="Directory of LongBench's dataset2prompt.json.")
    add("--limit", type=positive_int, help="Questions of a --jsonl file. Default: all.")
    add("--harness", metavar="TASKS", help="Tasks of lm-evaluation-harness, with commas.")
    add("--harness-args", metavar="ARGS", help="Further arguments of lm_eval, in quotes.")
