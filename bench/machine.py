"""What a figure was measured on."""

import datetime
import os
import platform
from pathlib import Path

import numba
import torch
import vllm

from think_vllm import __version__


def describe_machine() -> str:
    """One line: date, processor, threads, versions."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return (
        f"{datetime.date.today()}; {model}, {len(os.sched_getaffinity(0))} cores; "
        f"torch {torch.__version__}, vLLM {vllm.__version__}, numba {numba.__version__}, "
        f"think-vllm {__version__}"
    )
