"""Tables, claims and plots of quality on the bundled model: ``python -m bench.quality_tables``.

Every configuration (``bench/tables/configurations.py``) is a vLLM engine in a process of its own,
which answers the same recall prompts of 512, 1,024 and 2,048 tokens (``tables/questions.py``).
Answers are written as they come, to ``bench/out``: a run that was interrupted goes on where it was.
Rows of another version of ``think_vllm/`` are run again, unless ``--keep-rows`` is given.

It writes what the answers come to, ``results.json``, and plots, and the section of
``docs/quality.md`` between its two markers. The bundled model says nothing about real language
models (models/README.md).
"""

import argparse
import fnmatch
import re
import shlex
import sys
from pathlib import Path

from bench.tables.configurations import Configuration, configurations
from bench.tables.engine import ask, check, code_version, flags
from bench.tables.figures import DENSE, count
from bench.tables.report import write_report
from bench.tables.results import Results
from think_vllm.errors import ThinkError
from think_vllm.tools.common.figures import check_matplotlib
from think_vllm.tools.common.machine import this_machine

ANSWERS = Path("bench/out/quality-tables.json")
OUT = Path("docs/results/quality-tables")
DOCUMENT = Path("docs/quality.md")


def fill(results: Results, wanted: list[Configuration], options: argparse.Namespace) -> None:
    """Run the configurations that have no row of this code yet."""
    code = code_version()
    for number, configuration in enumerate(wanted, 1):
        name = configuration.name
        row = results.rows.get(name)
        if row is not None and (options.keep_rows or row.code == code):
            continue
        head = f"{number}/{len(wanted)} {name}"
        try:
            check(configuration)
        except ThinkError as error:
            # A setting that this version does not have yet, or no longer.
            results.skipped[name] = re.split(r";| \(", str(error))[0]
            print(f"{head}: not run: {results.skipped[name]}", flush=True)
            continue
        print(f"{head}: {shlex.join(flags(configuration)) or 'no flags'}", flush=True)
        try:
            results.rows[name] = ask(configuration, results)
        except ThinkError as error:
            results.skipped[name] = f"failed: {error}"
            print(f"  {results.skipped[name]}", flush=True)
            continue
        results.skipped.pop(name, None)
        command = shlex.join(["python", "-m", "bench.quality_tables", *sys.argv[1:]])
        results.provenance = {**this_machine(with_device=False).model_dump(), "command": command}
        results.save(options.answers)
        print(f"  {results.rows[name].seconds:.0f} s", flush=True)


def main() -> None:
    """Run what is missing, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/tiny-recall"))
    parser.add_argument("--samples", type=int, default=200, help="prompts of each size")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--answers", type=Path, default=ANSWERS, help="of all questions so far")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="its section is replaced")
    parser.add_argument("--only", nargs="+", default=["*"], help="names or patterns of them")
    parser.add_argument("--keep-rows", action="store_true", help="of whichever version")
    parser.add_argument("--report", action="store_true", help="run nothing, write the report")
    parser.add_argument("--no-report", action="store_true", help="only ask")
    options = parser.parse_args()
    check_matplotlib("quality_tables")
    everything = {configuration.name: configuration for configuration in configurations()}
    names = {name for pattern in options.only for name in fnmatch.filter(everything, pattern)}
    if not names:
        raise SystemExit(f"--only {shlex.join(options.only)}: no configuration has such a name")
    # The others are compared with its answers.
    wanted = [everything[name] for name in everything if name in {*names, DENSE}]
    asked = Results(model=str(options.model), seed=options.seed, samples=options.samples)
    results = Results.load(options.out / "results.json", asked)
    if not options.report:
        answers = Results.load(options.answers, asked)
        fill(answers, wanted, options)
        count(answers)
        results.provenance = answers.provenance or results.provenance
        results.skipped = answers.skipped
        results.rows |= {
            name: row.model_copy(update={"answers": {}}) for name, row in answers.rows.items()
        }
    # In the order of the list, whichever came first; without those that it no longer has.
    results.rows = {name: results.rows[name] for name in everything if name in results.rows}
    results.save(options.out / "results.json")
    for path in [] if options.no_report else write_report(results, options.out, options.document):
        print(path)


if __name__ == "__main__":
    main()
