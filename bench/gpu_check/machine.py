"""What was measured, and on what."""

import re
import sys
from pathlib import Path
from typing import Any

from bench.support.repository import REPOSITORY, ask, describe_commit
from think_vllm.tools.common.compact import write_json
from think_vllm.tools.common.machine import this_machine

#: Written by ``make gpu-kit``: the copy on a lent machine may have no history.
KIT_COMMIT = REPOSITORY / ".kit" / "commit"
#: Names of ours, and what nvidia-smi calls them.
GPU_FIELDS = {
    "gpu": "name",
    "driver": "driver_version",
    "gpu_memory": "memory.total",
    "sm_clock": "clocks.sm",
    "max_sm_clock": "clocks.max.sm",
    "memory_clock": "clocks.mem",
    "power_limit": "power.limit",
}


def gpu_machine() -> dict[str, object]:
    """Date, GPU, clocks, driver, versions, command and commit; what cannot be told is left out."""
    fields = ",".join(GPU_FIELDS.values())
    gpu = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    machine = this_machine(with_device=False).model_dump(exclude={"device", "num_devices"})
    command = [sys.executable, *sys.orig_argv[1:]]
    return {**machine, **read_gpu(gpu), "command": command, "commit": find_commit()}


def write_result(path: Path | None, **fields: Any) -> None:
    """Write what was found with the machine, whole or not at all; nothing without a path."""
    if path is not None:
        write_json(path, {"machine": gpu_machine(), **fields})


def read_gpu(answer: str) -> dict[str, str]:
    """What nvidia-smi said of the first GPU; empty if it said nothing."""
    if not answer:
        return {}
    return dict(zip(GPU_FIELDS, map(str.strip, answer.splitlines()[0].split(",")), strict=False))


def find_commit() -> str:
    """Commit of the repository, ``-dirty`` behind it if files were changed; empty if unknown."""
    if commit := describe_commit():
        return commit
    return KIT_COMMIT.read_text(encoding="utf-8").strip() if KIT_COMMIT.is_file() else ""


def folder_name(machine: dict[str, object]) -> str:
    """``gpu-NAME-DATE``, in characters that every file system takes."""
    name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "none")).lower()).strip("-")
    return f"gpu-{name}-{str(machine['date'])[:10]}"
