"""Check and measure on a GPU: ``python -m bench.gpu_check [1 | 2] [--out FOLDER]``.

Without a number, both parts. Part 1 needs no vLLM for most of its sections; part 2 serves models
with it. Everything goes to the folder as text and JSON as soon as it is known; ``python -m
bench.gpu_check.plots FOLDER`` draws it later, on any machine. Exits with 1 if something failed or
was too slow; what needs a program that is not installed is left out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.gpu_check.machine import folder_name, gpu_machine
from bench.gpu_check.runner import FAILED, TIMED_OUT, run_all
from bench.gpu_check.sections import BUDGETS, sections_of
from bench.support.repository import REPOSITORY


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu_check", description=__doc__)
    parser.add_argument("part", type=int, nargs="?", choices=[1, 2], help="both if left out")
    parser.add_argument("--out", type=Path, help="results/gpu-NAME-DATE if left out")
    parser.add_argument("--archive", type=Path, help="pack results into this .tar.gz, too")
    parser.add_argument("--section", nargs="*", help="run only these")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts."""
    options = make_parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: torch sees no GPU", file=sys.stderr)
        return 1
    machine = gpu_machine()
    out = options.out or REPOSITORY / "results" / folder_name(machine)
    print(f"{machine}\nresults: {out}\n", flush=True)
    bad = []
    for part in (options.part,) if options.part else (1, 2):
        sections = sections_of(part)
        if options.section is not None:
            sections = [section for section in sections if section.name in options.section]
        done = run_all(str(part), sections, out.resolve(), BUDGETS[part], machine, options.archive)
        bad += [ended.name for ended in done if ended.status in (FAILED, TIMED_OUT)]
    print(f"results: {out}; " + (f"failed: {', '.join(bad)}" if bad else "nothing failed"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
