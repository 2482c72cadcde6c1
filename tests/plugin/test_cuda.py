"""Choosing the CUDA backend, and rejecting what it cannot do, without a GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.processes import run_python
from think_vllm.errors import ThinkError
from think_vllm.hooks import engine_support
from think_vllm.hooks.backend import select_backend


class Platform:
    """What we ask of ``vllm.platforms.current_platform``."""

    def __init__(self, name: str, capability: int = 90) -> None:
        self.device_name, self.capability = name, capability

    def is_cpu(self) -> bool:
        return self.device_name == "cpu"

    def is_cuda(self) -> bool:
        return self.device_name == "cuda"

    def has_device_capability(self, capability: int) -> bool:
        return self.capability >= capability

    def get_device_capability(self) -> Any:
        major, minor = divmod(self.capability, 10)
        return SimpleNamespace(as_version_str=lambda: f"{major}.{minor}")


def config(
    dtype: torch.dtype = torch.bfloat16, head_size: int = 128, ubatching: bool = False
) -> Any:
    return SimpleNamespace(
        use_v2_model_runner=True,
        model_config=SimpleNamespace(
            dtype=dtype,
            get_head_size=lambda: head_size,
            get_sliding_window=lambda: None,
            hf_text_config=SimpleNamespace(layer_types=None),
            get_total_num_hidden_layers=lambda: 2,
        ),
        parallel_config=SimpleNamespace(use_ubatching=ubatching),
        cache_config=SimpleNamespace(block_size=16, user_specified_block_size=False),
        additional_config={"think": {"kv_channel_prune": 0.5}},
    )


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gpus_are_served(capability, dtype, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", Platform("cuda", capability))
    engine_support.check_device(config(dtype))
    path = select_backend(config(dtype))
    assert path == "think_vllm.worker.cuda.backend.ThinkCUDABackend"


@pytest.mark.parametrize(
    ("platform", "engine", "message"),
    [
        (Platform("cuda", 75), config(), "compute capability 7.5; the kernels need 8.0"),
        (Platform("cuda"), config(torch.float32), "dtype is float32; on GPUs use --dtype bfloat16"),
        (Platform("cuda"), config(head_size=32), "head size is 32; on GPUs it must be at least 64"),
        (Platform("cuda"), config(ubatching=True), "do not support microbatching"),
        (Platform("rocm"), config(), "the device is rocm"),
        (Platform("cpu"), config(), "model runner V2 on CPUs"),
    ],
    ids=["capability", "float32", "head-size", "microbatches", "rocm", "cpu-v2"],
)
def test_what_gpus_cannot_do_is_rejected(platform, engine, message, monkeypatch):
    monkeypatch.setattr("vllm.platforms.current_platform", platform)
    with pytest.raises(ThinkError, match=message) as error:
        engine_support.check_device(engine)
    assert "without --kv-channel-prune" in str(error.value)


def test_batch_invariance_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform", Platform("cuda"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ThinkError, match="VLLM_BATCH_INVARIANT"):
        engine_support.check_device(config())


IMPORTS_ON_CPUS = """
import sys
import think_vllm.worker.cpu.backend
ours = [m for m in sys.modules if m.startswith(("csrc_triton", "think_vllm.worker.cuda"))]
assert not ours, ours
"""
IMPORTS_ON_GPUS = """
import sys
import think_vllm.worker.cuda.backend as backend
import think_vllm.worker.static.cuda as static
assert backend.ThinkCUDABackend.get_name() == static.StaticCUDABackend.get_name() == "CUSTOM"
theirs = [m for m in sys.modules if m.startswith(("think_vllm.kernels.cpu", "numba"))]
assert not theirs, theirs
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [IMPORTS_ON_CPUS, IMPORTS_ON_GPUS], ids=["cpu", "cuda"])
def test_backends_import_no_kernels_of_the_other_device(code: str) -> None:
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
