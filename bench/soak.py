"""Thousands of requests of all lengths against a server that has too few blocks for them.

Not about speed: it checks that every answer is the right one, that clients who hang up leave
nothing behind, and that no block is lost. See ``tests/support/soak.py`` for what is sent and what
must hold; ``tests/e2e/test_soak.py`` is the same, shorter. Exits with 1 if something does not hold.
Run: ``python -m bench.soak``.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from bench.machine import describe_machine
from tests.support.reference import Reference, Thinning
from tests.support.server import Server
from tests.support.soak import CASES, Case, Soaked, soak

HEADER = (
    "| format | requests | answered | cut off | refused | tokens | preemptions | compared | alone "
    "| worst | by float64 | too close to call | load s | all s | failures |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def run_case(case: Case, options: argparse.Namespace) -> Soaked:
    """Start a server, load it, check it, stop it."""
    jobs = case.jobs(options.seed, options.requests)
    with tempfile.TemporaryDirectory() as folder:
        model = case.model(Path(folder))
        log = Path(folder) / "server.log"
        with Server(model, case.server_arguments(), log, case.pool_bytes()) as server:
            return soak(
                server,
                Reference(model),
                Thinning.of(case.plan),
                jobs,
                precise=case.precise(),
                concurrency=options.concurrency,
                alone=options.alone,
                exact_prefixes=case.exact_prefixes,
            )


def table_row(name: str, done: Soaked, seconds: float) -> str:
    """One row."""
    found = done.found
    kinds = Counter(
        "refused" if job.status != 200 else "answered" if got.done else "cut off"
        for job, got in zip(done.jobs, done.outcomes, strict=True)
    )
    cells = [
        name,
        len(done.jobs),
        *(kinds[kind] for kind in ("answered", "cut off", "refused")),
        sum(len(got.tokens) for got in done.outcomes),
        done.preemptions,
        found.compared,
        found.compared_alone,
        f"{found.worst:.1e}",
        found.rescored,
        len(found.tossed),
        f"{done.seconds:.0f}",
        f"{seconds:.0f}",
        len(found.failures),
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    """Print a Markdown table; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1200, help="of each format")
    parser.add_argument("--concurrency", type=int, default=24)
    parser.add_argument("--alone", type=int, default=100, help="asked for again, one at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--no-prefix-caching", action="store_true")
    options = parser.parse_args()
    print(describe_machine())
    print(f"seed {options.seed}, {options.concurrency} requests at a time\n\n{HEADER}", flush=True)
    failed = False
    for name in options.only:
        case = replace(CASES[name], prefix_caching=not options.no_prefix_caching)
        start = time.monotonic()
        done = run_case(case, options)
        print(table_row(name, done, time.monotonic() - start), flush=True)
        for failure in done.found.failures:
            print(f"{name}: {failure}", file=sys.stderr, flush=True)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
