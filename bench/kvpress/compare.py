"""Ask kvpress what ``bench.quality_tables`` asked: ``python -m bench.kvpress.compare``.

Runs in an environment of its own, with the packages of ``requirements.txt``, from the root of the
repository. Takes questions, ratios and budgets from the float32 rows of ``results.json``, and
writes ``kvpress.json`` beside it; ``python -m bench.quality_tables --report`` then shows both.

A prompt is compressed once it has been computed, as kvpress does; the answer follows, led along the
right tokens, from the compressed cache. Rows that are there are not run again.
"""

import argparse
import dataclasses
import datetime
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as transformers_logging

from bench.kvpress.choices import compare_choices
from bench.kvpress.presses import KINDS, Case
from bench.tables.beside import CHOICES, FILE
from bench.tables.questions import Question, judge, questions
from bench.tables.results import Results, Row
from think_vllm.tools.common.provenance import collect_provenance

#: Prompts whose choices are compared directly; the references loop in Python.
DIRECT_PROMPTS = 5


def cases(ours: Results) -> Iterator[tuple[str, Case, Row]]:
    """Rows to measure: the name of each, and ours of the same ratio and budget."""
    for name, row in ours.rows.items():
        if row.group != "float32":
            continue
        for kind in KINDS if row.settings else ("dense",):
            case = Case(kind, row.labels["ratio"], row.labels["budget"], row.plan)
            yield f"{name}, {kind}", case, row


@torch.inference_mode()
def lead(model: Any, case: Case, question: Question) -> tuple[list[float], list[int]]:
    """Log-probability of each right token, and the likeliest one in its place."""
    prompt = torch.tensor([question.prompt])
    answer = torch.tensor([question.answer])
    length = prompt.shape[1]
    cache = DynamicCache()
    with case.press(model, length):
        first = model(prompt, past_key_values=cache, use_cache=True).logits[0, -1:]
    # Evicted tokens leave the positions of later ones as they were.
    positions = torch.arange(length, length + answer.shape[1] - 1)[None]
    later = model(
        answer[:, :-1], past_key_values=cache, position_ids=positions, use_cache=True
    ).logits[0]
    logprobs = torch.cat([first, later]).float().log_softmax(dim=-1)
    right = logprobs.gather(1, answer[0, :, None])[:, 0]
    return right.tolist(), logprobs.argmax(dim=-1).tolist()


def ask(model: Any, case: Case, ours: Results, row: Row) -> Row:
    """Ask one case what the row was asked."""
    begin = time.monotonic()
    theirs = Row(
        group="kvpress",
        labels={"kind": case.kind, "ratio": case.ratio, "budget": case.budget},
        settings=row.settings,
        dtype="float32",
        code=f"kvpress {version('kvpress')}",
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=0.0,
        plan=row.plan,
        answers={},
    )
    for way in row.answers:
        for question in questions(way, ours.seed, ours.samples):
            theirs.add(way, question, judge(question, *lead(model, case, question)))
    theirs.seconds = round(time.monotonic() - begin, 1)
    return theirs


def provenance(arguments: Sequence[str]) -> dict[str, Any]:
    """Where the figures come from, kvpress among the versions."""
    found = dataclasses.asdict(collect_provenance([]))
    found["command"] = shlex.join(["python", "-m", "bench.kvpress.compare", *arguments])
    found["versions"]["kvpress"] = version("kvpress")
    return found


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("docs/results/quality-tables"))
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    ours = Results.model_validate_json((options.results / "results.json").read_text("utf-8"))
    path = options.results / FILE
    asked = Results(model=ours.model, seed=ours.seed, samples=ours.samples)
    theirs = Results.load(path, asked)
    model = AutoModelForCausalLM.from_pretrained(
        ours.model, dtype=torch.float32, local_files_only=True
    ).eval()
    if CHOICES not in theirs.notes:
        shortest = list(questions("asked", ours.seed, DIRECT_PROMPTS))[:DIRECT_PROMPTS]
        theirs.notes[CHOICES] = compare_choices(model, [x.prompt for x in shortest])
        for line in theirs.notes[CHOICES]:
            print(line, flush=True)
    for name, case, row in cases(ours):
        if name in theirs.rows:
            continue
        theirs.rows[name] = ask(model, case, ours, row)
        theirs.provenance = provenance(sys.argv[1:])
        theirs.save(path)
        print(f"{name}: {theirs.rows[name].seconds:.0f} s", flush=True)
    theirs.save(path)


if __name__ == "__main__":
    main()
