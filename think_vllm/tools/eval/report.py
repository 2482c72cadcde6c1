"""The report of an evaluation: Markdown for people, JSON for programs, answers line by line."""

import json
import shlex
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from think_vllm.tools.common.compact import write_json
from think_vllm.tools.common.markdown import table
from think_vllm.tools.eval.harness import HarnessTable
from think_vllm.tools.eval.plots import draw_bars, draw_heatmaps
from think_vllm.tools.eval.stats import Difference, estimate_text
from think_vllm.tools.eval.summary import TOO_HARD, Figure, Group, Run, by_cell, by_length, by_task

REPORT_FILE, RESULTS_FILE, ANSWERS_FILE = "report.md", "results.json", "answers.jsonl"
#: Of the layout of `RESULTS_FILE`.
SCHEMA = 1
#: Options that have a place of their own in the results, or another form.
_NOT_SETTINGS = (
    *("base_url", "config", "plain", "label", "out"),
    *("server_args", "harness_args", "extra_body"),
)
_ESTIMATES = ("score", "to the first", "better", "worse", "p")
_COLUMNS = ("task", "server", "asked", "failed", "cut off", *_ESTIMATES)
_NOTES = """\
Brackets are 95 % intervals: Wilson's for answers that are right or wrong, a bootstrap's for scores
in between. Differences are those of the first server's answers to the same questions (Newcombe's
interval, or a paired bootstrap); p is McNemar's exact test, or a sign test of scores, and is not
corrected for the number of rows. An interval of equal scores in between is unknown, and left out.
Requests that failed have no score, and are counted beside it."""


def write_report(
    options: Namespace,
    runs: Sequence[Run],
    harness: Sequence[HarnessTable],
    provenance: dict[str, Any],
) -> None:
    """Write the files and the plots."""
    directory, seed = options.out, options.seed
    tasks: list[Group] = []
    lengths: list[Group] = []
    cells: list[Group] = []
    plots: list[Path] = []
    if results := runs[0].results:
        tasks, lengths, cells = (by(runs, seed) for by in (by_task, by_length, by_cell))
        if options.plots:
            plots = [draw_bars(tasks, directory / "tasks.png"), *draw_heatmaps(cells, directory)]
    settings = {name: x for name, x in vars(options).items() if name not in _NOT_SETTINGS}
    settings["lengths"] = sorted({result.question.length for result in results})
    document = {
        "schema": SCHEMA,
        "provenance": provenance,
        "settings": settings,
        "servers": [
            {x.name: getattr(run, x.name) for x in fields(Run) if x.name != "results"}
            for run in runs
        ],
        "by_task": [asdict(group) for group in tasks],
        "by_length": [asdict(group) for group in lengths],
        "by_cell": [asdict(group) for group in cells],
        "harness": [asdict(one) for one in harness],
    }
    write_json(directory / RESULTS_FILE, document)
    text = "".join(f"{line}\n" for line in _answers(runs))
    (directory / ANSWERS_FILE).write_text(text, encoding="utf-8")
    lines = [
        *_head(runs, provenance),
        *_scores(runs, tasks, seed),
        *_by_length(runs, tasks, lengths),
    ]
    lines += [*_harness(harness), *(f"\n![{plot.stem}]({plot.name})" for plot in plots)]
    (directory / REPORT_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _answers(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for result in run.results:
            answer = asdict(result)
            line = {"server": run.label, **answer.pop("question"), **answer}
            # Prompts are long, and the seed brings them back.
            del line["prompt"]
            yield json.dumps(line, ensure_ascii=False)


def _head(runs: Sequence[Run], provenance: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {text}" for name, text in provenance["versions"].items())
    yield "# Evaluation\n"
    yield (
        f"{provenance['date']}; {provenance['processor']}, {provenance['cores']} cores; "
        f"Python {provenance['python']}, {versions}\n"
    )
    yield f"`{provenance['command']}`\n"
    yield table(
        ["server", "model", "version", "flags"],
        ([run.label, run.model, run.version or "unknown", _flags(run)] for run in runs),
    )


def _flags(run: Run) -> str:
    if run.flags is not None:
        return f"`{shlex.join(run.flags)}`" if run.flags else "none"
    return f"`{json.dumps(run.settings)}`" if run.settings else "unknown"


def _scores(runs: Sequence[Run], tasks: Sequence[Group], seed: int) -> Iterator[str]:
    if not tasks:
        return
    yield f"\nSeed {seed}, {len(runs[0].results)} questions for each server.\n"
    yield table(_COLUMNS, (_row(group, figure) for group in tasks for figure in group.figures))
    yield f"\n{_NOTES}"
    hard = [group.task for group in tasks if group.is_too_hard]
    if hard:
        yield (
            f"\n**{runs[0].label} scores below {TOO_HARD:g} at {', '.join(hard)}: a difference "
            "there says nothing.** Such a task is too hard for the model, or its prompt does "
            "not suit it (`--chat`?)."
        )


def _row(group: Group, figure: Figure) -> list[str]:
    counts = [str(count) for count in (figure.asked, figure.failed, figure.cut_off)]
    return [
        *(group.task, figure.label, *counts, estimate_text(figure.mean)),
        *_difference(figure.difference),
    ]


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["-"] * 4
    counts = [str(difference.better), str(difference.worse)]
    return [estimate_text(difference.estimate, "+"), *counts, f"{difference.p_value:.3g}"]


def _by_length(
    runs: Sequence[Run], tasks: Sequence[Group], lengths: Sequence[Group]
) -> Iterator[str]:
    if len(lengths) > len(tasks):
        yield "\n## By length\n"
        yield table(
            ["task", "tokens", *(run.label for run in runs)],
            (
                [group.task, str(group.length), *(estimate_text(x.mean) for x in group.figures)]
                for group in lengths
            ),
        )


def _harness(tables: Sequence[HarnessTable]) -> Iterator[str]:
    if tables:
        yield "\n## lm-evaluation-harness\n"
        prefill = "no: scored in the pass over the prompt"
        yield table(
            ["task", "metric", "server", "value", "measures thin blocks"],
            (
                [
                    *(line.task, line.metric, one.label, estimate_text(line.estimate)),
                    "yes" if line.generates else prefill,
                ]
                for one in tables
                for line in one.lines
            ),
        )
