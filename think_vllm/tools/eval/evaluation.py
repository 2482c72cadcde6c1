"""One evaluation: questions are generated once, asked of one server after the other, reported."""

import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.common.client import Client, RequestError, ServedModel
from think_vllm.tools.common.figures import check_matplotlib
from think_vllm.tools.common.machine import this_machine
from think_vllm.tools.common.server import ServerError, StartedServer
from think_vllm.tools.eval.harness import HarnessTable, find_harness, run_harness
from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.report import write_report
from think_vllm.tools.eval.runner import ask_all
from think_vllm.tools.eval.summary import Run
from think_vllm.tools.eval.target import Target, targets_of
from think_vllm.tools.eval.tasks import check_tasks, make_questions
from think_vllm.tools.eval.tasks.haystack import Frame, read_sentences
from think_vllm.tools.eval.tokens import server_counter, tokenizer_counter

#: Longest prompts by default: they are to end the same day.
DEFAULT_LONGEST = 32_768
#: Further attempts of a request that failed in a way that may pass.
RETRIES = 2


class Evaluation:
    """An evaluation; files and names are checked before anything starts.

    Raises:
        ThinkError: If something is missing.
    """

    def __init__(self, options: Namespace, arguments: Sequence[str]) -> None:
        self._options = options
        self._command = shlex.join(["think-vllm", "eval", *arguments])
        self._targets = targets_of(options)
        check_tasks(options.tasks)
        self._sentences = read_sentences(options.haystack) if options.haystack else ()
        self._harness = find_harness() if options.harness else None
        if options.plots:
            check_matplotlib("eval")
        self._questions: list[Question] | None = None
        self._runs: list[Run] = []
        self._tables: list[HarnessTable] = []

    def run(self) -> int:
        """Ask all servers and write the report, of those before one that fails, too.

        Returns:
            Requests that failed.

        Raises:
            ThinkError: If a server cannot be asked.
        """
        options = self._options
        for target in self._targets:
            # All of them, before hours are spent on the first.
            if target.url is not None:
                self._model(self._client(target.url))
        options.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            stack.callback(self._report)
            for number, target in enumerate(self._targets):
                with self._url(target, number) as url:
                    self._evaluate(target, self._client(url))
        return sum(result.score is None for run in self._runs for result in run.results)

    def _client(self, url: str) -> Client:
        return Client(url, "eval", self._options.timeout_s, RETRIES)

    @contextmanager
    def _url(self, target: Target, number: int) -> Iterator[str]:
        """Yield a server's address, and end the server if it was started here."""
        options = self._options
        if target.url is not None:
            yield target.url
            return
        assert options.serve is not None
        assert target.flags is not None
        arguments = [*options.server_arguments, *target.flags]
        log = options.out / f"server-{number}.log"
        try:
            with StartedServer(options.serve, arguments, log, options.start_timeout_s) as server:
                yield server.url
                server.check_alive()
        except ServerError as error:
            raise ThinkError(f"eval: {target.label}: {error}") from None

    def _model(self, client: Client) -> ServedModel:
        """The model that is to be asked."""
        models = {model.name: model for model in client.models()}
        names = ", ".join(models) or "no model"
        wanted = self._options.model
        if wanted is None and len(models) != 1:
            raise ThinkError(f"eval: {client.url} serves {names}; choose one with --model NAME")
        if wanted is not None and wanted not in models:
            raise ThinkError(f"eval: {client.url} serves {names}, not {wanted}; correct --model")
        return models[wanted] if wanted is not None else next(iter(models.values()))

    def _evaluate(self, target: Target, client: Client) -> None:
        options = self._options
        model = self._model(client)
        if self._questions is None:
            self._questions = self._make_questions(client, model) if options.tasks else []
        longest = max((question.length for question in self._questions), default=0)
        if model.max_model_len is not None and longest > model.max_model_len:
            raise ThinkError(
                f"eval: {target.label} takes {model.max_model_len} tokens, the questions have up "
                f"to {longest}; give shorter --lengths"
            )
        results = []
        if self._questions:
            results = ask_all(
                client,
                model.name,
                self._questions,
                chat=options.chat,
                extra=options.extra,
                concurrency=options.concurrency,
                label=target.label,
            )
        flags = None if target.flags is None else (*options.server_arguments, *target.flags)
        run = Run(
            label=target.label,
            url=target.url,
            flags=flags,
            model=model.name,
            max_model_len=model.max_model_len,
            version=_field(client, "/version", "version"),
            # vLLM has it with VLLM_SERVER_DEV_MODE=1 only.
            settings=_field(
                client, "/server_info?config_format=json", "vllm_config", "additional_config"
            ),
            results=results,
        )
        self._runs.append(run)
        if self._harness is not None:
            output = options.out / "harness" / str(len(self._runs) - 1)
            sys.stderr.write(f"{target.label}: lm_eval, log in {output}\n")
            self._tables.append(
                run_harness(self._harness, client.url, model, target.label, output, options)
            )

    def _make_questions(self, client: Client, model: ServedModel) -> list[Question]:
        options = self._options
        template_options = options.extra.get("chat_template_kwargs")
        if options.tokenizer is not None:
            count = tokenizer_counter(options.tokenizer, options.chat, template_options)
        else:
            count = server_counter(client, model.name, options.chat, template_options)
        frame = Frame(0, None, count, options.chat, options.max_tokens, self._sentences)
        return make_questions(
            options.tasks,
            self._lengths(model),
            options.depths,
            options.samples,
            options.seed,
            frame,
            options.concurrency,
        )

    def _lengths(self, model: ServedModel) -> list[int]:
        lengths: list[int] = self._options.lengths
        if lengths:
            longest = max(lengths)
            if model.max_model_len is not None and longest > model.max_model_len:
                raise ThinkError(
                    f"eval: --lengths {longest}: {model.name} takes {model.max_model_len} tokens; "
                    "give shorter ones, or serve with a larger --max-model-len"
                )
            return lengths
        if model.max_model_len is None:
            raise ThinkError(
                "eval: the server does not say how many tokens it takes; give --lengths TOKENS"
            )
        longest = min(DEFAULT_LONGEST, model.max_model_len)
        return [longest // 4, longest // 2, longest]

    def _report(self) -> None:
        """Write the report of the servers so far; nothing if there is none."""
        if self._runs:
            provenance = {**this_machine(with_device=False).model_dump(), "command": self._command}
            write_report(self._options, self._runs, self._tables, provenance)


def _field(client: Client, path: str, *keys: str) -> Any:
    """A field of what vLLM's servers say; None from others."""
    try:
        value = client.get_json(path)
        for key in keys:
            value = value[key]
    except (RequestError, KeyError, TypeError):
        return None
    return value
