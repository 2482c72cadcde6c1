"""What this machine and its packages are good for."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import TYPE_CHECKING

from think_vllm import VLLM_VERSIONS, __version__
from think_vllm.hooks.platform import supported_vllm
from think_vllm.tools.doctor.finding import Finding, Level
from think_vllm.tools.loading import PLUGIN_GROUP, PLUGIN_NAME, left_out

if TYPE_CHECKING:
    from collections.abc import Iterator


def check_versions() -> Iterator[Finding]:
    """Versions, and whether vLLM finds the plugin."""
    import torch
    import vllm

    versions = (
        f"Python {platform.python_version()}, vLLM {vllm.__version__}, torch {torch.__version__}, "
        f"think-vllm {__version__}"
    )
    if supported_vllm():
        yield Finding(Level.GOOD, "versions", versions)
    else:
        remedy = f"this version works with vLLM {VLLM_VERSIONS}: install that"
        yield Finding(Level.BAD, "versions", f"{versions}; {remedy}")
    names = {point.name for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)}
    if PLUGIN_NAME not in names:
        yield Finding(
            Level.BAD,
            "plugin",
            f"{sys.executable} has no entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP!r}; install "
            "think-vllm with pip into the environment of vLLM",
        )
    elif why := left_out():
        yield Finding(Level.BAD, "plugin", why)
    else:
        yield Finding(Level.GOOD, "plugin", "vLLM finds it")


def check_machine() -> Iterator[Finding]:
    """The device, and what its kernels need."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cores = len(os.sched_getaffinity(0))
        yield Finding(Level.GOOD, "device", f"CPU {platform.machine()}, {cores} cores")
        if platform.machine() != "x86_64":
            yield Finding(Level.NOTE, "device", "the CPU kernels were run on x86-64 only")
        return
    if not current_platform.is_cuda():
        yield Finding(
            Level.BAD,
            "device",
            f"{current_platform.device_name}: there are kernels for CPUs and for NVIDIA GPUs",
        )
        return
    capability = current_platform.get_device_capability()
    yield Finding(
        Level.GOOD,
        "device",
        f"{current_platform.get_device_name()}, compute capability "
        f"{capability.as_version_str() if capability else 'unknown'}, "
        f"{current_platform.get_device_total_memory() / 2**30:.0f} GiB",
    )
    yield Finding(
        Level.NOTE,
        "device",
        "the GPU kernels have not run on a GPU yet: the generation below shows whether they work",
    )
