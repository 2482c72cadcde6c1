"""What figures were measured on."""

import datetime
import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from think_vllm import __version__

PACKAGES = ("torch", "transformers", "numba", "triton")
#: How vLLM's CPU build is told which cores to use.
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
        device = "" if self.device == "cpu" else f"; {self.num_devices} x {self.device}"
        packages = ", ".join(f"{name} {text}" for name, text in self.versions.items())
        binding = f"; {BINDING_VARIABLE}={self.thread_binding}" if self.thread_binding else ""
        return (
            f"{self.date}; {self.processor}, {self.cores} cores, "
            f"{self.memory_bytes / 2**30:.0f} GiB{device}; Python {self.python}, {packages}"
            f"{binding}"
        )


def this_machine() -> Machine:
    """Look at the machine that this process runs on."""
    import vllm
    from vllm.platforms import current_platform

    is_cpu = current_platform.is_cpu()
    return Machine(
        date=now(),
        processor=processor_name(),
        cores=usable_cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        device="cpu" if is_cpu else current_platform.get_device_name(),
        num_devices=1 if is_cpu else current_platform.device_count(),
        python=platform.python_version(),
        versions={"think-vllm": __version__, "vllm": vllm.__version__} | package_versions(PACKAGES),
        thread_binding=os.environ.get(BINDING_VARIABLE),
    )


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor_name() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
