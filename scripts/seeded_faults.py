"""Seed faults of one line each, and see which of them the tests catch.

For whoever makes the tests fewer or faster: they still have to catch what they caught before. The
faults are those of ``seeded_faults.toml``, one in each room. Each goes into a copy of the working
tree, where the tests run on one core until the first one fails, cheap ones first. A copy without
a fault runs along, and must pass. All faults take three hours on two cores.

Run: ``python -m scripts.seeded_faults``, ``... missed-free tables-overlap`` for some of them,
``... --tier all`` for the tests that ``make test`` leaves out, too.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_suffix(".toml")
#: In this order: most faults show in seconds.
FOLDERS = ("unit", "plugin", "kernels", "triton", "deploy", "engine", "e2e")
#: Seconds after which the tests of a copy count as hung.
LIMIT_S = 90 * 60
NO_FAULT = "no-fault"

_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """A line that does the wrong thing."""

    name: str
    file: str  # below the repository
    line: str  # a piece of one of its lines
    becomes: str
    wrong: str  # what then happens

    def seed(self, tree: Path) -> None:
        """Change the line.

        Raises:
            ValueError: If it is not there, or more than once.
        """
        path = tree / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.line) != 1:
            raise ValueError(
                f"seeded-faults: {self.file} has {self.line!r} {text.count(self.line)} times; "
                f"fault {self.name} needs it once. Mend {TABLE.name}"
            )
        path.write_text(text.replace(self.line, self.becomes), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What the tests said of one copy."""

    name: str
    failed: str | None  # the first test that failed, or why it counts as one; None if all passed
    seconds: float


def read_faults() -> list[Fault]:
    """The table."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [Fault(**row) for row in table["fault"]]


def copied_files() -> Iterator[Path]:
    """Files of the working tree, and kernels that numba has compiled, relative to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    yield from (Path(name) for name in listed.split("\0") if name)
    yield from (path.relative_to(REPOSITORY) for path in REPOSITORY.glob("think_vllm/**/*.nbc"))


def copy_tree(tree: Path) -> None:
    """Copy the working tree, as a git repository of its own."""
    for name in copied_files():
        source = REPOSITORY / name
        if source.is_file() or source.is_symlink():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, tree / name, follow_symlinks=False)
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
    for command in (("init", "-q"), ("add", "--all"), (*who, "commit", "-qm", "copy")):
        subprocess.run(["git", "-C", str(tree), *command], check=True)


def run_tests(tree: Path, tier: str, log: Path) -> str | None:
    """Run the tests of a copy until one fails.

    Returns:
        Which one; None if all passed.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    # Which looks whether each line is as it should be.
    command += ["--ignore=tests/unit/scripts/test_seeded_faults.py", f"--tier={tier}"]
    command += [f"tests/{folder}" for folder in FOLDERS]
    # Its modules come before those of the installed package.
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            return f"hung: no end after {LIMIT_S // 60} minutes"
        finally:
            stop(process)
    if status == 0:
        return None
    failed = _FAILED.search(log.read_text(encoding="utf-8", errors="replace"))
    return failed[1] if failed else f"pytest ended with status {status}"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that may have ended, and all its children."""
    if process.poll() is None:
        family = psutil.Process(process.pid)
        for member in [*family.children(recursive=True), family]:
            member.kill()
        process.wait()


def examine(fault: Fault | None, tier: str, logs: Path) -> Outcome:
    """Run the tests of a copy with a fault, or with none."""
    name = NO_FAULT if fault is None else fault.name
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"fault-{name}-") as folder:
        copy_tree(Path(folder))
        if fault is not None:
            fault.seed(Path(folder))
        failed = run_tests(Path(folder), tier, logs / f"{name}.log")
    return Outcome(name, failed, time.monotonic() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Seed faults."""
    faults = {fault.name: fault for fault in read_faults()}
    parser = argparse.ArgumentParser(prog="seeded_faults", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="which faults; all, and none, if left out")
    parser.add_argument("--tier", default="usual", help="which tests, as pytest's (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="copies at a time (%(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("/tmp/seeded-faults"))
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - {NO_FAULT, *faults})
    if unknown:
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join(faults)}")
    options.logs.mkdir(parents=True, exist_ok=True)
    chosen = options.names or [NO_FAULT, *faults]
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(examine, faults.get(n), options.tier, options.logs) for n in chosen]
        for job in jobs:
            outcomes.append(outcome := job.result())
            if outcome.name == NO_FAULT and outcome.failed:
                print(f"the copy without a fault fails {outcome.failed}; mend that first")
                pool.shutdown(cancel_futures=True)
                return 1
            print(
                f"{outcome.name:24} {outcome.seconds:6.0f} s  {outcome.failed or '-'}", flush=True
            )
    seeded = [outcome for outcome in outcomes if outcome.name != NO_FAULT]
    missed = [outcome.name for outcome in seeded if outcome.failed is None]
    print(f"{len(seeded) - len(missed)} of {len(seeded)} faults caught; the output of each run is "
          f"in {options.logs}")  # fmt: skip
    if missed:
        print(f"missed: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
