"""Threads: numba takes torch's number, and torch keeps it."""

import pytest

from tests.support.processes import run_python

PROBE = """
import os, sys
import torch
if sys.argv[2] == "bound":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as vLLM does before we are imported
torch.set_num_threads(int(sys.argv[1]))
from think_vllm.plan.settings import ThinkConfig
from think_vllm.kernels.cpu.threads import SERIAL_WORK, choose_threads
from think_vllm.worker.cpu.warmup import warm_up
from think_vllm.plan.planner import plan_blocks
warm_up(torch.float32, 2, 1, plan_blocks(ThinkConfig(kv_channel_prune=0.5), 64, 4))
print(torch.get_num_threads(), choose_threads(SERIAL_WORK), choose_threads(1))
"""


@pytest.mark.parametrize("binding", ["bound", "free"])
@pytest.mark.parametrize("threads", [1, 3])
def test_choose_threads_takes_torchs_number_and_leaves_it(threads: int, binding: str) -> None:
    # In a process of its own: numba starts its threads once.
    done = run_python("-c", PROBE, str(threads), binding)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(threads), str(threads), "1"]
