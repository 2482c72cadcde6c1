"""A statically pruned server of two ranks; on one: tests/engine/test_static.py."""

import os
from pathlib import Path

import pytest

from tests.e2e.conftest import Serve
from tests.support.checks import EAGER
from tests.support.models import make_exact_llama
from tests.support.static_server import Static

pytestmark = pytest.mark.e2e


def test_codes_on_two_ranks(serve: Serve, tmp_path: Path) -> None:
    # Whole prompts in one step. Each rank has one KV head, and takes its own row of the tables.
    # Codes are compared on a model whose keys are the same bits everywhere: see its docstring.
    model = make_exact_llama(tmp_path / "model", head_size=64, num_heads=4, num_kv_heads=2)
    static = Static(model, tmp_path, 64, kv_channel_prune=0.3, kv_quant="fp8")
    assert (static.plan.key_channels, static.plan.value_channels) == (45, 64)
    cores = sorted(os.sched_getaffinity(0))
    server = serve(
        *EAGER,
        *static.arguments,
        *("--tensor-parallel-size", "2", "--max-num-batched-tokens", "4096"),
        model=model,
        environment={"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"},
    )
    static.check(server, [1, 63, 64, 65, 500, 1000], [70] * 6)
