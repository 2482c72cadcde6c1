"""``think-vllm bench``: load tests of plain vLLM and thin blocks in equal KV memory."""

import argparse
import logging
import os
import shlex
from collections.abc import Sequence

from think_vllm.errors import ThinkError
from think_vllm.tools.bench.comparison import check_comparable, rows_of
from think_vllm.tools.bench.configuration import (
    DEFAULT_FLAGS,
    Configuration,
    Engine,
    make_configurations,
    read_engine,
    shared_flags,
)
from think_vllm.tools.bench.generator import LoadGenerator
from think_vllm.tools.bench.options import chosen_scenarios, parse_options
from think_vllm.tools.bench.plots import draw
from think_vllm.tools.bench.report import csv_text, markdown
from think_vllm.tools.bench.results import Results, ServerRecord
from think_vllm.tools.bench.session import Session, say
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
        scenarios=chosen_scenarios(options),
    )
    baseline, notes = None, []
    if options.compare is not None:
        baseline = Results.read(options.compare)
        notes = [f"compared with plain vLLM of an earlier run, {baseline.machine.date}"]
        notes += check_comparable(results, baseline, options.base_url)
    busy = os.getloadavg()[0]
    if busy > results.machine.cores / 2:
        say(
            f"the machine has other work (load average {busy:.1f}, {results.machine.cores} cores): "
            "times will depend on it; compare running requests, or come back later"
        )
    interrupted = None
    try:
        with interruptible(), LoadGenerator() as generator:
            session = Session(generator, results, options.out)
            if options.base_url:
                _load_running(options, results, session)
            else:
                _load_started(options, results, session)
    except Interrupted as error:
        interrupted = error
    if results.measurements or results.failures:
        _report(options, results, baseline, notes)
    if interrupted is not None:
        say(f"{interrupted}; what was measured is in {options.out}")
        return 128 + interrupted.number
    say(f"results: {options.out}")
    return 1 if results.failures else 0


def _load_started(options: argparse.Namespace, results: Results, session: Session) -> None:
    """Start servers one after the other, and load them."""
    shared = shared_flags(options.server_args) if options.server_args else ()
    flags = DEFAULT_FLAGS if options.config is None else options.config
    configurations = make_configurations(flags, not options.no_plain, options.fp8_cache)
    # As many sequences as there are requests by default: only memory limits them.
    sequences = options.max_num_seqs or max(one.most_in_flight for one in results.scenarios)
    memory = ("--kv-cache-memory-bytes", str(options.kv_cache_memory_bytes))
    shared = (*shared, *memory, "--max-num-seqs", str(sequences))
    if why := left_out():
        raise ThinkError(f"bench: {why}")
    say(f"reading {options.model}")
    engines = [_engine(one, shared, results) for one in configurations]
    _make_folder(options)
    session.run(list(zip(configurations, engines, strict=True)), shared, options.start_timeout)


def _engine(configuration: Configuration, shared: Sequence[str], results: Results) -> Engine:
    """Check a server before any is started, and add it to the results."""
    flags = configuration.flags
    who = f'bench: --config "{shlex.join(flags)}"' if flags else "bench"
    engine = read_engine(results.model, (*shared, *flags), who)
    if configuration.kind in ("plain", "fp8 cache") and engine.thin is not None:
        raise ThinkError(
            "bench: --server-args turn thin blocks on for the plain server too, and leave "
            "nothing to compare; give these settings in --config"
        )
    for scenario in results.scenarios:
        scenario.check_length(engine.max_model_len)
    plan = None if engine.thin is None else engine.thin.fields(engine.prefix_caching)
    if engine.thin is not None and plan is None:
        raise ThinkError(f"{who} prunes no channel of this model; give a larger ratio")
    label, kind = configuration.label, configuration.kind
    results.servers.append(ServerRecord(label=label, kind=kind, flags=list(flags), plan=plan))
    return engine


def _load_running(options: argparse.Namespace, results: Results, session: Session) -> None:
    """Load a server that was not started here."""
    server, max_model_len = find_server(options.base_url, options.model)
    if max_model_len is not None:
        for scenario in results.scenarios:
            scenario.check_length(max_model_len)
    record = ServerRecord(label=options.label, kind="external", flags=[])
    record.read_cache(server)
    results.servers.append(record)
    _make_folder(options)
    try:
        for turn in range(results.rounds):
            session.load(server, record, results.scenarios, turn)
    except OSError as error:
        raise ThinkError(f"bench: {options.base_url} does not answer: {error}") from None
    session.complete()


def _report(
    options: argparse.Namespace, results: Results, baseline: Results | None, notes: list[str]
) -> None:
    """Write tables and plots."""
    rows = rows_of(results, baseline)
    text = markdown(results, rows, notes)
    (options.out / "results.md").write_text(text, encoding="utf-8")
    (options.out / "results.csv").write_text(csv_text(results), encoding="utf-8")
    if not options.no_plots and rows:
        draw(results, rows, options.out)


def _make_folder(options: argparse.Namespace) -> None:
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ThinkError(f"bench: --out {options.out}: {error}; name another one") from None
