"""The report of an evaluation: Markdown for people, JSON for programs, answers line by line."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from think_vllm.tools.common.compact import write_json
from think_vllm.tools.common.provenance import Provenance
from think_vllm.tools.eval.harness import HarnessTable
from think_vllm.tools.eval.stats import Difference, Estimate
from think_vllm.tools.eval.summary import TOO_HARD, Figure, Group, Run, by_cell, by_length, by_task

REPORT_FILE, RESULTS_FILE, ANSWERS_FILE = "report.md", "results.json", "answers.jsonl"
#: Of the layout of `RESULTS_FILE`.
SCHEMA = 1
_ESTIMATES = ("score", "to the first", "better", "worse", "p")
_COLUMNS = ("task", "server", "asked", "failed", "cut off", *_ESTIMATES)
_NOTES = """\
Brackets are 95 % intervals: Wilson's for answers that are right or wrong, a bootstrap's for scores
in between. Differences are those of the first server's answers to the same questions (Newcombe's
interval, or a paired bootstrap); p is McNemar's exact test, or a sign test of scores, and is not
corrected for the number of rows. An interval of equal scores in between is unknown, and left out.
Requests that failed have no score, and are counted beside it."""


def write_report(
    directory: Path,
    runs: Sequence[Run],
    harness: Sequence[HarnessTable],
    provenance: Provenance,
    settings: dict[str, Any],
    plots: Sequence[Path],
) -> None:
    """Write the three files.

    Args:
        directory: Where to; exists.
        runs: The servers' answers.
        harness: What lm-evaluation-harness found; empty without it.
        provenance: Where the figures come from.
        settings: Of the run: seed, tasks and so on.
        plots: Files of `directory` that the report shows.
    """
    seed = settings["seed"]
    tasks, lengths, cells = (
        (by_task(runs, seed), by_length(runs, seed), by_cell(runs, seed))
        if runs[0].results
        else ([], [], [])
    )
    document = {
        "schema": SCHEMA,
        "provenance": asdict(provenance),
        "settings": settings,
        "servers": [
            {
                "label": run.label,
                "url": run.url,
                "flags": None if run.flags is None else list(run.flags),
                **asdict(run.card),
            }
            for run in runs
        ],
        "by_task": [asdict(group) for group in tasks],
        "by_length": [asdict(group) for group in lengths],
        "by_cell": [asdict(group) for group in cells],
        "harness": [asdict(table) for table in harness],
    }
    write_json(directory / RESULTS_FILE, document)
    _write(directory / ANSWERS_FILE, "".join(f"{line}\n" for line in _answers(runs)))
    text = "\n".join(_markdown(runs, tasks, lengths, harness, provenance, settings, plots))
    _write(directory / REPORT_FILE, text + "\n")


def estimate_text(estimate: Estimate | None) -> str:
    """A figure with its interval, as ``0.950 [0.888, 0.978]``."""
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def difference_text(difference: Difference | None) -> str:
    """A difference with its interval, as ``-0.050 [-0.112, +0.004]``."""
    if difference is None:
        return "-"
    value, low, high = (
        difference.estimate.value,
        difference.estimate.low,
        difference.estimate.high,
    )
    if low is None or high is None:
        return f"{value:+.3f}"
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _answers(runs: Sequence[Run]) -> Iterator[str]:
    for run in runs:
        for result in run.results:
            question = asdict(result.question)
            # Prompts are long, and the seed or the file makes them again.
            del question["prompt"], question["classes"]
            yield json.dumps(
                {"server": run.label, **question, **asdict(result.answer), "score": result.score},
                ensure_ascii=False,
            )


def _markdown(
    runs: Sequence[Run],
    tasks: Sequence[Group],
    lengths: Sequence[Group],
    harness: Sequence[HarnessTable],
    provenance: Provenance,
    settings: dict[str, Any],
    plots: Sequence[Path],
) -> Iterator[str]:
    yield "# Evaluation\n"
    yield f"{provenance}\n"
    yield f"`{provenance.command}`\n"
    yield from _table(
        ["server", "model", "version", "flags"],
        (
            [
                run.label,
                run.card.model,
                run.card.version or "unknown",
                _flags(run),
            ]
            for run in runs
        ),
    )
    if tasks:
        yield f"\nSeed {settings['seed']}, {len(runs[0].results)} questions for each server.\n"
        yield from _table(
            _COLUMNS,
            (_row(group, figure) for group in tasks for figure in group.figures),
        )
        yield f"\n{_NOTES}"
        hard = [group.task for group in tasks if group.is_too_hard]
        if hard:
            yield (
                f"\n**{runs[0].label} scores below {TOO_HARD:g} at {', '.join(hard)}: a difference "
                "there says nothing.** Such a task is too hard for the model, or its prompt does "
                "not suit it (`--chat`?)."
            )
    if len({(group.task, group.length) for group in lengths}) > len(tasks):
        yield "\n## By length\n"
        yield from _table(
            ["task", "tokens", *(run.label for run in runs)],
            (
                [
                    group.task,
                    str(group.length),
                    *(estimate_text(figure.mean) for figure in group.figures),
                ]
                for group in lengths
            ),
        )
    if harness:
        yield "\n## lm-evaluation-harness\n"
        yield from _harness(harness)
    for plot in plots:
        yield f"\n![{plot.stem}]({plot.name})"


def _flags(run: Run) -> str:
    if run.flags is not None:
        return f"`{shlex.join(run.flags)}`" if run.flags else "none"
    return f"`{json.dumps(run.card.settings)}`" if run.card.settings else "unknown"


def _row(group: Group, figure: Figure) -> list[str]:
    difference = figure.difference
    return [
        group.task,
        figure.label,
        str(figure.asked),
        str(figure.failed),
        str(figure.cut_off),
        estimate_text(figure.mean),
        difference_text(difference),
        *(
            ["-", "-", "-"]
            if difference is None
            else [str(difference.better), str(difference.worse), f"{difference.p_value:.3g}"]
        ),
    ]


def _harness(tables: Sequence[HarnessTable]) -> Iterator[str]:
    yield from _table(
        ["task", "metric", "server", "value", "measures thin blocks"],
        (
            [
                line.task,
                line.metric,
                table.label,
                estimate_text(line.estimate),
                "yes" if line.generates else "no: scored in the pass over the prompt",
            ]
            for table in tables
            for line in table.lines
        ),
    )


def _table(header: Sequence[str], rows: Iterator[list[str]]) -> Iterator[str]:
    for cells in (header, ["---"] * len(header), *rows):
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
