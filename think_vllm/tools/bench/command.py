"""``think-vllm bench``: load tests of plain vLLM and thin blocks in equal KV memory."""

import argparse
import datetime
import logging
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from think_vllm.errors import ThinkError
from think_vllm.plan.summary import plan_fields, static_fields
from think_vllm.tools.bench import plots
from think_vllm.tools.bench.comparison import check_comparable, rows_of
from think_vllm.tools.bench.configuration import (
    DEFAULT_FLAGS,
    Engine,
    make_configurations,
    read_engine,
    shared_flags,
)
from think_vllm.tools.bench.gauges import cache_of
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.options import check_options, chosen_scenarios, parse_options
from think_vllm.tools.bench.report import csv_text, markdown
from think_vllm.tools.bench.results import RESULTS_FILE, Results, ServerRecord
from think_vllm.tools.bench.session import Session, Setup
from think_vllm.tools.common.interrupts import Interrupted, interruptible
from think_vllm.tools.common.machine import this_machine
from think_vllm.tools.common.server import find_server
from think_vllm.tools.loading import left_out


def bench(arguments: Sequence[str]) -> int:
    """Run load tests; return the exit status: 1 if something failed.

    Raises:
        ThinkError: If the run as given makes no sense, before anything is started.
    """
    options = parse_options(arguments)
    scenarios = chosen_scenarios(options)
    check_options(options)
    # What vLLM says while it reads a config comes again in each server's log.
    logging.getLogger("vllm").setLevel(logging.ERROR)
    results = Results(
        machine=this_machine(),
        command=shlex.join(["think-vllm", "bench", *arguments]),
        model=options.model,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        seed=options.seed,
        rounds=options.rounds,
        note=options.note,
        scenarios=scenarios,
    )
    run = _Run(options, results)
    busy = os.getloadavg()[0]
    if busy > results.machine.cores / 2:
        _say(
            f"the machine has other work (load average {busy:.1f}, {results.machine.cores} cores): "
            "times will depend on it; compare running requests, or come back later"
        )
    try:
        with interruptible():
            if options.base_url:
                run.load_running()
            else:
                run.load_started()
    except Interrupted as signal:
        run.report()
        _say(f"{signal}; what was measured is in {run.folder}")
        return 128 + signal.number
    run.report()
    _say(f"results: {run.folder}")
    return 1 if results.failures else 0


class _Run:
    """One run, its folder, and the files there."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self.folder: Path = options.out
        self._options = options
        self._results = results
        self._baseline: Results | None = None
        self._notes: list[str] = []
        if options.compare is not None:
            self._baseline = Results.read(options.compare)
            self._notes = check_comparable(results, self._baseline, options.base_url)
            date = self._baseline.machine.date
            self._notes.insert(0, f"compared with plain vLLM of an earlier run, {date}")

    def load_started(self) -> None:
        """Start servers one after the other."""
        options, results = self._options, self._results
        shared = shared_flags(options.server_args) if options.server_args else ()
        given = DEFAULT_FLAGS if options.config is None else options.config
        configurations = make_configurations(given, not options.no_plain, options.fp8_cache)
        in_flight = max(scenario.most_in_flight for scenario in results.scenarios)
        # As many sequences as there are requests, if not told otherwise: only memory limits them.
        sequences = options.max_num_seqs or in_flight
        memory = ("--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes))
        shared = (*shared, *memory, "--max-num-seqs", str(sequences))
        if why := left_out():
            raise ThinkError(f"bench: {why}")
        _say(f"reading {options.model}")
        engines: dict[str, Engine] = {}
        for one in configurations:
            who = f'bench: --config "{shlex.join(one.flags)}"' if one.flags else "bench"
            engines[one.label] = engine = read_engine(options.model, (*shared, *one.flags), who)
            if one.kind in ("plain", "fp8 cache") and engine.settings is not None:
                raise ThinkError(
                    "bench: --server-args turn thin blocks on for the plain server too, and leave "
                    "nothing to compare; give these settings in --config"
                )
            for scenario in results.scenarios:
                scenario.check_length(engine.max_model_len)
            if engine.settings is not None and not (engine.plan or engine.static):
                raise ThinkError(f"{who} prunes no channel of this model; give a larger ratio")
            plan = None if engine.plan is None else plan_fields(engine.plan, engine.prefix_caching)
            if engine.static is not None:
                plan = static_fields(engine.static)
            results.servers.append(
                ServerRecord(label=one.label, kind=one.kind, flags=list(one.flags), plan=plan)
            )
        logs = self._make_folder() / "logs"
        logs.mkdir(exist_ok=True)
        setup = Setup(shared, logs, options.start_timeout)
        with LoadGenerator() as generator:
            session = Session(generator, results, self._save, _say)
            session.run(configurations, engines, setup)

    def load_running(self) -> None:
        """Load a server that somebody else started."""
        options, results = self._options, self._results
        server, max_model_len = find_server(options.base_url, options.model)
        if max_model_len is not None:
            for scenario in results.scenarios:
                scenario.check_length(max_model_len)
        record = ServerRecord(label=options.label, kind="external", flags=[])
        if (cache := cache_of(server.get("/metrics"))) is not None:
            record.kv_cache_dtype, record.block_size = cache.dtype, cache.block_size
            record.num_blocks = cache.num_blocks
        results.servers.append(record)
        self._make_folder()
        with LoadGenerator() as generator:
            session = Session(generator, results, self._save, _say)
            try:
                for turn in range(results.rounds):
                    session.load(server, record, results.scenarios, turn)
            except OSError as error:
                raise ThinkError(f"bench: {options.base_url} does not answer: {error}") from None
        results.complete = True
        self._save()

    def report(self) -> None:
        """Write tables and pictures, if there is anything."""
        if not self._results.measurements and not self._results.failures:
            return
        rows = rows_of(self._results, self._baseline)
        text = markdown(self._results, rows, self._notes)
        (self.folder / "results.md").write_text(text, encoding="utf-8")
        (self.folder / "results.csv").write_text(csv_text(self._results), encoding="utf-8")
        if not self._options.no_plots and rows:
            plots.draw(self._results, rows, self.folder)

    def _make_folder(self) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ThinkError(f"bench: --out {self.folder}: {error}; name another one") from None
        return self.folder

    def _save(self) -> None:
        self._results.write(self.folder / RESULTS_FILE)


def _say(line: str) -> None:
    time = datetime.datetime.now().strftime("%H:%M:%S")
    print(f"{time} {line}", flush=True)
