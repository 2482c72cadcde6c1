"""Run sections one after another, each within its time, and keep what each of them found.

A section is a command. Whatever becomes of it, the next one runs. Its output goes to ``NAME.txt``
while it runs; ``check-PART.json`` names all sections that have ended, and is written after each.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from think_vllm.tools.common.compact import write_json

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
#: How long a section that is out of time may take to write what it has.
GRACE_S = 3.0
#: With less than this left, a section is not started.
SHORTEST_S = 1.0
TAIL_LINES = 25


@dataclass(frozen=True)
class Section:
    """One thing to find out."""

    name: str  # of its files
    limit_s: float  # most seconds that it may take
    #: Program and arguments, in which ``{out}`` stands for the folder of results.
    command: tuple[str, ...]
    needs: str = ""  # a program without which the section is not run; empty for none
    environment: tuple[tuple[str, str], ...] = ()  # variables for the command, on top of ours


@dataclass(frozen=True)
class Ended:
    """What became of a section."""

    name: str  # of the section
    status: str  # ``PASSED``, ``FAILED``, ``TIMED_OUT`` or ``NOT_RUN``
    why: str  # of what was not run, or could not be started
    returncode: int | None  # None unless the command ended by itself
    seconds: float  # that it took
    limit_s: float  # that it had
    command: list[str]  # as it was run
    output: str  # file of its output, in the folder of results
    figures: list[str]  # files that it left there, by name


def run_section(section: Section, out: Path, left_s: float) -> Ended:
    """Run one section.

    Args:
        section: What to run.
        out: Folder of results; exists.
        left_s: Seconds that all the sections still have.
    """
    limit = min(section.limit_s, left_s)
    command = [part.replace("{out}", str(out)) for part in section.command]
    output = out / f"{section.name}.txt"
    before = _json_files(out)
    start = time.monotonic()
    status, why, returncode = NOT_RUN, "", None
    if limit < SHORTEST_S:
        why = "no time left"
    elif section.needs and shutil.which(section.needs) is None:
        why = f"{section.needs} is not installed"
    else:
        environment = os.environ | dict(section.environment)
        try:
            status, returncode = _run(command, environment, output, limit)
        except OSError as error:
            status, why = FAILED, str(error)
    written = _json_files(out)
    return Ended(
        name=section.name,
        status=status,
        why=why,
        returncode=returncode,
        seconds=round(time.monotonic() - start, 1),
        limit_s=limit,
        command=command,
        output=output.name,
        figures=sorted(name for name, stamp in written.items() if before.get(name) != stamp),
    )


def _run(
    command: list[str], environment: dict[str, str], output: Path, limit: float
) -> tuple[str, int | None]:
    """Status and return code. All processes of a command that runs too long are ended."""
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            returncode = process.wait(limit)
        except subprocess.TimeoutExpired:
            # First so that Python programs can still write what they have.
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            return TIMED_OUT, None
        finally:
            # Of a command that has ended, too: servers that it has left hold memory of the GPU.
            _signal(process, signal.SIGKILL)
            process.wait()
    return (PASSED if returncode == 0 else FAILED), returncode


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _json_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def run_all(
    part: str,
    sections: Sequence[Section],
    out: Path,
    budget_s: float,
    machine: dict[str, Any],
    archive: Path | None = None,
) -> list[Ended]:
    """Run all sections in their order, say what became of each, and write it down.

    Args:
        part: Name of the file: ``check-PART.json``.
        sections: What to run.
        out: Folder of results; made if it is not there.
        budget_s: Most seconds for all together.
        machine: What they run on.
        archive: A ``.tar.gz`` to pack all results into after each section: what a lent machine
            gives back can be limited to a few files.
    """
    out.mkdir(parents=True, exist_ok=True)
    # Not ignored, as it is in what a shell starts in the background: sections would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = time.monotonic() + budget_s
    done: list[Ended] = []
    for section in sections:
        print(f"== {section.name}, {section.limit_s:g} s at most", flush=True)
        ended = run_section(section, out, end - time.monotonic())
        done.append(ended)
        print(_tail(out / ended.output), end="")
        why = f" ({ended.why})" if ended.why else ""
        print(f"-- {ended.name}: {ended.status}{why}, {ended.seconds:g} s\n", flush=True)
        told = {"machine": machine, "sections": [asdict(ended) for ended in done]}
        write_json(out / f"check-{part}.json", told)
        if archive is not None:
            _pack(out, archive)
    return done


def _pack(out: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    # Whoever ends this program while it packs still finds the archive of the section before.
    unfinished = archive.with_name(archive.name + ".part")
    with tarfile.open(unfinished, "w:gz") as packed:
        packed.add(out, arcname=out.name)
    unfinished.replace(archive)


def _tail(path: Path) -> str:
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "".join(f"{line}\n" for line in lines)
