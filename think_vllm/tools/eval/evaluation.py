"""One evaluation: questions made once, asked of one server after the other, reported."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.provenance import collect_provenance
from think_vllm.tools.eval.bars import draw_bars
from think_vllm.tools.eval.client import Asker, Card, Endpoint, read_card
from think_vllm.tools.eval.harness import (
    PROGRAM,
    HarnessTable,
    find_harness,
    harness_command,
    run_harness,
)
from think_vllm.tools.eval.heatmap import draw_heatmaps
from think_vllm.tools.eval.pictures import check_pictures
from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.report import ANSWERS_FILE, write_report
from think_vllm.tools.eval.runner import ask_all
from think_vllm.tools.eval.summary import Run, by_cell, by_task
from think_vllm.tools.eval.target import Target, opened
from think_vllm.tools.eval.tasks import check_tasks, make_questions
from think_vllm.tools.eval.tasks.haystack import Frame, read_sentences
from think_vllm.tools.eval.tasks.longbench import longbench_questions, read_prompts, read_rows
from think_vllm.tools.eval.tokens import LocalTokens, ServerTokens, Tokens

API_KEY_VARIABLE = "OPENAI_API_KEY"
#: Longest prompts that are made unless others are asked for: they are to end the same day.
DEFAULT_LONGEST = 32_768


@dataclass(frozen=True)
class Options:
    """What ``think-vllm eval --help`` lists."""

    targets: list[Target]
    serve: str | None
    server_arguments: tuple[str, ...]
    start_timeout_s: float
    model: str | None
    chat: bool
    extra: dict[str, Any]
    tokenizer: str | None
    tasks: list[str]
    lengths: list[int]
    depths: list[float]
    samples: int
    seed: int
    haystack: Path | None
    jsonl: list[Path]
    jsonl_metric: str
    longbench_config: Path | None
    limit: int | None
    harness: str | None
    harness_arguments: tuple[str, ...]
    max_tokens: int | None
    concurrency: int
    timeout_s: float
    plots: bool
    out: Path


class Evaluation:
    """An evaluation; files and names are checked before anything starts.

    Args:
        options: Of the command line.
        arguments: The command line, for the report.

    Raises:
        ThinkError: If something is missing.
    """

    def __init__(self, options: Options, arguments: Sequence[str]) -> None:
        self.options = options
        self._arguments = arguments
        check_tasks(options.tasks)
        self._sentences = read_sentences(options.haystack) if options.haystack else ()
        self._rows = [
            row
            for path in options.jsonl
            for row in read_rows(path, options.jsonl_metric)[: options.limit]
        ]
        self._prompts = read_prompts(options.longbench_config) if options.longbench_config else {}
        self._harness = find_harness() if options.harness else None
        if options.plots:
            check_pictures()
        self._questions: list[Question] | None = None
        self._runs: list[Run] = []
        self._tables: list[HarnessTable] = []

    @property
    def answers(self) -> Path:
        """File of single answers."""
        return self.options.out / ANSWERS_FILE

    def run(self) -> int:
        """Ask all servers and write the report, of those before one that fails, too.

        Returns:
            Requests that failed.

        Raises:
            ThinkError: If a server cannot be asked.
        """
        options = self.options
        for target in options.targets:
            # All of them, before hours are spent on the first.
            if target.url is not None:
                read_card(self._endpoint(target.url), options.model)
        options.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._report)
            for number, target in enumerate(options.targets):
                log = options.out / f"server-{number}.log"
                with opened(
                    target, options.serve, options.server_arguments, log, options.start_timeout_s
                ) as url:
                    self._ask(target, url)
        return sum(result.score is None for run in self._runs for result in run.results)

    def _endpoint(self, url: str) -> Endpoint:
        return Endpoint(url, os.environ.get(API_KEY_VARIABLE), self.options.timeout_s)

    def _ask(self, target: Target, url: str) -> None:
        options = self.options
        endpoint = self._endpoint(url)
        card = read_card(endpoint, options.model)
        if self._questions is None:
            self._questions = self._make_questions(endpoint, card)
        longest = max((question.length or 0 for question in self._questions), default=0)
        if card.max_model_len is not None and longest > card.max_model_len:
            raise ThinkError(
                f"eval: {target.label} takes {card.max_model_len} tokens, the questions have up "
                f"to {longest}; give shorter --lengths"
            )
        extra = tuple(options.extra.items())
        asker = Asker(endpoint, card.model, options.chat, extra)
        results = []
        if self._questions:
            results = ask_all(asker, self._questions, options.concurrency, target.label)
        flags = target.flags
        if flags is not None:
            flags = (*options.server_arguments, *flags)
        self._runs.append(Run(target.label, target.url, flags, card, results))
        if self._harness is not None and options.harness is not None:
            output = options.out / "harness" / str(len(self._runs) - 1)
            command = harness_command(
                self._harness,
                endpoint.url,
                card.model,
                options.harness,
                output,
                chat=options.chat,
                concurrency=options.concurrency,
                tokenizer=options.tokenizer,
                max_model_len=card.max_model_len,
                further=options.harness_arguments,
            )
            sys.stderr.write(f"{target.label}: {PROGRAM}, log in {output}\n")
            self._tables.append(run_harness(command, target.label, output))

    def _make_questions(self, endpoint: Endpoint, card: Card) -> list[Question]:
        options = self.options
        if not options.tasks and not self._rows:
            return []
        tokens = self._tokens(endpoint, card.model)
        frame = Frame(
            length=0,
            depth=None,
            count=tokens.count,
            chat=options.chat,
            max_tokens=options.max_tokens,
            sentences=self._sentences,
        )
        questions = make_questions(
            options.tasks,
            self._lengths(card) if options.tasks else [],
            options.depths,
            options.samples,
            options.seed,
            frame,
            options.concurrency,
        )
        if self._rows:
            room = card.max_model_len or max(options.lengths, default=0)
            if not room:
                raise ThinkError(
                    f"eval: {endpoint.url} does not say how many tokens it takes; say it with "
                    "--lengths TOKENS"
                )
            questions += longbench_questions(
                self._rows, self._prompts, options.jsonl_metric, tokens, room, options.max_tokens
            )
        return questions

    def _tokens(self, endpoint: Endpoint, model: str) -> Tokens:
        template_options = self.options.extra.get("chat_template_kwargs")
        if self.options.tokenizer is not None:
            return LocalTokens(self.options.tokenizer, self.options.chat, template_options)
        return ServerTokens(endpoint, model, self.options.chat, template_options)

    def _lengths(self, card: Card) -> list[int]:
        if self.options.lengths:
            longest = max(self.options.lengths)
            if card.max_model_len is not None and longest > card.max_model_len:
                raise ThinkError(
                    f"eval: --lengths {longest}: {card.model} takes {card.max_model_len} tokens; "
                    "give shorter ones, or serve with a larger --max-model-len"
                )
            return self.options.lengths
        if card.max_model_len is None:
            raise ThinkError(
                "eval: the server does not say how many tokens it takes; give --lengths TOKENS"
            )
        longest = min(DEFAULT_LONGEST, card.max_model_len)
        return [longest // 4, longest // 2, longest]

    def _report(self) -> None:
        """Write what there is; nothing if no server got that far."""
        if not self._runs:
            return
        options = self.options
        plots = []
        if options.plots and self._runs[0].results:
            plots.append(draw_bars(by_task(self._runs, options.seed), options.out))
            plots += draw_heatmaps(by_cell(self._runs, options.seed), options.out)
        settings = asdict(options)
        # The servers have a place of their own, and the directory says nothing to others.
        del settings["targets"], settings["out"]
        settings |= {
            name: None if settings[name] is None else str(settings[name])
            for name in ("haystack", "longbench_config")
        }
        settings["jsonl"] = [str(path) for path in options.jsonl]
        settings["lengths"] = sorted({q.length for q in self._questions or () if q.length})
        write_report(
            options.out,
            self._runs,
            self._tables,
            collect_provenance(self._arguments),
            settings,
            plots,
        )
