"""A run: one server after the other, each under every load."""

import datetime
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from think_vllm.tools.bench.configuration import Configuration, Engine
from think_vllm.tools.bench.driver import generator_arguments, measure_load
from think_vllm.tools.bench.gauges import cache_of
from think_vllm.tools.bench.generator import LoadError, LoadGenerator
from think_vllm.tools.bench.report import progress
from think_vllm.tools.bench.results import Failure, Figures, Measurement, Results, ServerRecord
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common.server import (
    KEEP_ALIVE,
    KEEP_ALIVE_S,
    Server,
    ServerError,
    StartedServer,
)

#: Before the first load of a scenario, so that nothing is compiled or paged in later.
WARM_UP = LoadPoint(4, concurrency=2)


@dataclass(frozen=True)
class Setup:
    """What all servers of a run share.

    Args:
        arguments: Of ``serve``: memory, sequences, and what the user gave.
        logs: Folder for the servers' output.
        start_timeout_s: Seconds a server may take to start.
    """

    arguments: tuple[str, ...]
    logs: Path
    start_timeout_s: float


class Session:
    """Measures servers into the results of a run.

    Args:
        generator: What sends requests.
        results: Of this run; grows.
        save: Called whenever there is something new in them.
        say: Tells a person one line.
    """

    def __init__(
        self,
        generator: LoadGenerator,
        results: Results,
        save: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._generator = generator
        self._results = results
        self._save = save
        self._say = say

    def run(
        self,
        configurations: Sequence[Configuration],
        engines: Mapping[str, Engine],
        setup: Setup,
    ) -> None:
        """Start, load and stop servers. One that fails is reported, and the others go on.

        Args:
            configurations: Of the servers; every second round begins with the last one.
            engines: What vLLM makes of them, by label.
            setup: What they share.
        """
        for turn in range(self._results.rounds):
            order = list(configurations) if turn % 2 == 0 else list(reversed(configurations))
            for place, configuration in enumerate(order):
                who = f"[{turn * len(order) + place + 1}/{self._results.rounds * len(order)}]"
                for caching, scenarios in _by_caching(self._results.scenarios):
                    arguments = (*setup.arguments, *configuration.flags, caching)
                    log = setup.logs / f"{turn}-{place}{caching.removeprefix('-')}.log"
                    server = StartedServer(
                        self._results.model, arguments, log, setup.start_timeout_s
                    )
                    record = self._results.server(configuration.label)
                    _remember(record.commands, serve_text(self._results.model, arguments))
                    self._say(f"{who} {record.label}: starting, log {log}")
                    start = time.monotonic()
                    try:
                        with server:
                            record.start_s = time.monotonic() - start
                            self._describe(record, server, engines[record.label])
                            self.load(server, record, scenarios, turn, who)
                    except (ServerError, OSError) as error:
                        self._fail(record, None, str(error), who)
        self._results.complete = True
        self._save()

    def load(
        self,
        server: Server,
        record: ServerRecord,
        scenarios: Sequence[Scenario],
        turn: int = 0,
        who: str = "[1/1]",
    ) -> None:
        """Put one server under every load.

        Args:
            server: That serves.
            record: Of it.
            scenarios: What is sent.
            turn: Number of the round.
            who: What lines about it begin with.

        Raises:
            ServerError: If it ends.
            OSError: If it is out of reach.
        """
        results = self._results
        for scenario in scenarios:
            # Other prompts for each load: what the one before left in the cache is of no use.
            seed = results.seed + 100 * results.scenarios.index(scenario)
            self._say(f"{who} {record.label}: {scenario.name}, warming up")
            few = scenario.model_copy(update={"num_prefixes": 1})
            try:
                arguments = generator_arguments(results.model, few, WARM_UP, seed + 99)
                self._generator.run(server, arguments)
            except LoadError as error:
                self._fail(record, f"{scenario.name}, warm-up", str(error), who)
                continue
            for number, point in enumerate(scenario.points()):
                what = f"{scenario.name}, {point}, {point.num_prompts} requests"
                date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                load_average = os.getloadavg()[0]
                try:
                    figures = measure_load(
                        self._generator, server, results.model, scenario, point, seed + number
                    )
                except LoadError as error:
                    self._fail(record, what, str(error), who)
                    continue
                self._say(f"{who} {record.label}: {what}: {progress(figures)}")
                if figures.failed:
                    self._fail(record, what, failed_text(figures), who)
                results.measurements.append(
                    Measurement(
                        server=record.label,
                        scenario=scenario.name,
                        concurrency=point.concurrency,
                        request_rate=point.request_rate,
                        num_prompts=point.num_prompts,
                        round=turn,
                        date=date,
                        load_average=load_average,
                        figures=figures,
                    )
                )
                self._save()

    def _describe(self, record: ServerRecord, server: Server, engine: Engine) -> None:
        """Write down the cache that a server has, and what fits it."""
        cache = cache_of(server.get("/metrics"))
        if cache is None:
            return
        record.kv_cache_dtype, record.block_size = cache.dtype, cache.block_size
        record.num_blocks = cache.num_blocks
        for scenario in self._results.scenarios:
            total = scenario.prompt_tokens + scenario.output_tokens
            held = engine.blocks_for(total, cache.block_size)
            if held and not scenario.prefix_tokens:
                record.capacity[scenario.name] = (cache.num_blocks - 1) // held

    def _fail(self, record: ServerRecord, load: str | None, message: str, who: str) -> None:
        self._results.failures.append(Failure(server=record.label, load=load, message=message))
        self._say(f"{who} {record.label}: {f'{load}: ' if load else ''}FAILED: {message}")
        self._save()


def failed_text(figures: Figures) -> str:
    """How many requests failed, and why."""
    text = f"{figures.failed} requests failed: {figures.reasons or 'no reason is known'}"
    if any("ServerDisconnectedError" in error for error in figures.errors):
        text += (
            "; the server closed connections that had waited for a request: if you started it "
            f"yourself, set {KEEP_ALIVE}={KEEP_ALIVE_S} in its environment"
        )
    return text


def serve_text(model: str, arguments: Sequence[str]) -> str:
    """A server's command as one would type it."""
    return shlex.join(["think-vllm", "serve", model, *arguments])


def _by_caching(scenarios: Sequence[Scenario]) -> Iterator[tuple[str, list[Scenario]]]:
    """Scenarios that one server can take, by the flag that it needs."""
    ordered = sorted(scenarios, key=lambda scenario: scenario.prefix_caching)
    for caching, group in groupby(ordered, key=lambda scenario: scenario.prefix_caching):
        yield "--enable-prefix-caching" if caching else "--no-enable-prefix-caching", list(group)


def _remember(texts: list[str], text: str) -> None:
    if text not in texts:
        texts.append(text)
