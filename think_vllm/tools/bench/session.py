"""A run: one server after the other, each under every load."""

import datetime
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from think_vllm.tools.bench.configuration import Configuration, Engine
from think_vllm.tools.bench.driver import generator_arguments, measure_load
from think_vllm.tools.bench.generator import LoadError, LoadGenerator
from think_vllm.tools.bench.report import progress
from think_vllm.tools.bench.results import (
    RESULTS_FILE,
    Failure,
    Figures,
    Measurement,
    Results,
    ServerRecord,
)
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


class Session:
    """Measures servers into the results of a run."""

    def __init__(self, generator: LoadGenerator, results: Results, folder: Path) -> None:
        self._generator = generator
        self._results = results
        self._folder = folder

    def run(
        self,
        servers: Sequence[tuple[Configuration, Engine]],
        arguments: Sequence[str],
        start_timeout_s: float,
    ) -> None:
        """Start, load and stop servers. One that fails is reported, and the others go on.

        Args:
            servers: Each with what vLLM makes of it; every second round begins with the last one.
            arguments: Of ``serve``, for all: memory, sequences, and those of the user.
            start_timeout_s: Seconds a server may take to start.
        """
        results = self._results
        logs = self._folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        for turn in range(results.rounds):
            order = list(servers) if turn % 2 == 0 else list(reversed(servers))
            for place, (configuration, engine) in enumerate(order):
                who = f"[{turn * len(order) + place + 1}/{results.rounds * len(order)}]"
                record = results.server(configuration.label)
                for caching, scenarios in _by_caching(results.scenarios):
                    flags = (*arguments, *configuration.flags, caching)
                    log = logs / f"{turn}-{place}{caching.removeprefix('-')}.log"
                    server = StartedServer(results.model, flags, log, start_timeout_s)
                    command = shlex.join(["think-vllm", "serve", results.model, *flags])
                    if command not in record.commands:
                        record.commands.append(command)
                    say(f"{who} {record.label}: starting, log {log}")
                    start = time.monotonic()
                    try:
                        with server:
                            record.start_s = time.monotonic() - start
                            self._describe(record, server, engine)
                            self.load(server, record, scenarios, turn, who)
                    except (ServerError, OSError) as error:
                        self._fail(record, None, str(error), who)
        self.complete()

    def complete(self) -> None:
        """Note that the run came to its end."""
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
            server: A healthy one.
            record: Of it.
            scenarios: What is sent.
            turn: Number of the round.
            who: Begins lines about it.

        Raises:
            ServerError: If it ends.
            OSError: If it is out of reach.
        """
        results = self._results
        for scenario in scenarios:
            # Other prompts for each load: the cached ones of the load before are of no use.
            seed = results.seed + 100 * results.scenarios.index(scenario)
            say(f"{who} {record.label}: {scenario.name}, warming up")
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
                say(f"{who} {record.label}: {what}: {progress(figures)}")
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
        """Record the cache that a server has, and how many requests fit it."""
        record.read_cache(server)
        for scenario in self._results.scenarios:
            if record.block_size is None or record.num_blocks is None or scenario.prefix_tokens:
                continue
            total = scenario.prompt_tokens + scenario.output_tokens
            if held := engine.blocks_for(total, record.block_size):
                record.capacity[scenario.name] = (record.num_blocks - 1) // held

    def _fail(self, record: ServerRecord, load: str | None, message: str, who: str) -> None:
        self._results.failures.append(Failure(server=record.label, load=load, message=message))
        say(f"{who} {record.label}: {f'{load}: ' if load else ''}FAILED: {message}")
        self._save()

    def _save(self) -> None:
        self._results.write(self._folder / RESULTS_FILE)


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"{datetime.datetime.now():%H:%M:%S} {line}", flush=True)


def failed_text(figures: Figures) -> str:
    """Number of requests that failed, and why."""
    text = f"{figures.failed} requests failed: {figures.reasons or 'no reason is known'}"
    if any("ServerDisconnectedError" in error for error in figures.errors):
        text += (
            "; the server closed connections that had waited for a request: if you started it "
            f"yourself, set {KEEP_ALIVE}={KEEP_ALIVE_S} in its environment"
        )
    return text


def _by_caching(scenarios: Sequence[Scenario]) -> Iterator[tuple[str, list[Scenario]]]:
    """Scenarios that one server can take, by the flag that it needs."""
    ordered = sorted(scenarios, key=lambda scenario: scenario.prefix_caching)
    for caching, group in groupby(ordered, key=lambda scenario: scenario.prefix_caching):
        yield "--enable-prefix-caching" if caching else "--no-enable-prefix-caching", list(group)
