import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import think_vllm
from tests.kernels.helpers import make_case, make_plan
from tests.support.processes import run_python
from think_vllm.kernels.cpu import attend, compaction, decode, scoring
from think_vllm.worker.channel_selection import top_channels
from think_vllm.worker.cpu.warmup import warm_up

KERNELS = [attend.attend, compaction._compact, scoring._key_energy, scoring._add_query_energy]


@pytest.mark.parametrize(
    ("dtype", "quant", "ratio"),
    [
        (torch.bfloat16, "none", 0.5),
        (torch.float16, "none", 0.5),
        (torch.float32, "none", 0.5),
        (torch.bfloat16, "fp8", 0.0),
        (torch.bfloat16, "k4v2", 0.5),
    ],
    ids=str,
)
def test_nothing_compiles_after_warm_up(dtype, quant, ratio):
    plan = make_plan(64, dtype, None, ratio, quant)
    warm_up(dtype, 4, 2, plan)
    compiled = [list(kernel.signatures) for kernel in KERNELS]

    # Other shapes, strides, index types and sizes than those of the warm-up.
    other = make_plan(128, dtype, 48, 0.4, quant)
    case = make_case(other, dtype, 10, 2, [(1500, 5), (300, 0)], gap_blocks=1)
    query = torch.zeros(2, 12, 128, dtype=dtype)[:, :10]
    out = torch.empty(2, 11, 128, dtype=dtype)[:, :10]
    decode.decode_attention(
        query, case.kv_cache, case.block_table, case.rows, other, 1.0, out, logits_soft_cap=2.0
    )
    request = np.ones(1, np.int64)
    frozen = np.full(1, 300)
    frozen.flags.writeable = False
    energy = torch.zeros(2, 128)
    scoring.add_query_energy(query, 0, 2, energy)
    keys = scoring.key_energy(case.kv_cache, case.block_table, request, frozen, other)
    channels = top_channels(energy * keys, other.key_channels)
    span = torch.zeros(1, dtype=torch.int32)
    compaction.compact_spans(case.kv_cache, case.block_table, request, span, channels, other)

    assert [list(kernel.signatures) for kernel in KERNELS] == compiled


WARM_UP = """
import torch
from think_vllm.plan.settings import ThinkConfig
from think_vllm.worker.channel_selection import top_channels
from think_vllm.kernels.cpu import attend
from think_vllm.worker.cpu.warmup import warm_up
from think_vllm.plan.planner import plan_blocks
warm_up(torch.float32, 2, 1, plan_blocks(ThinkConfig(kv_channel_prune=0.5), 64, 4))
hits = sum(attend.attend.stats.cache_hits.values())
print(attend.__file__, attend.attend.stats.cache_path, hits, sep="|")
"""


@pytest.mark.slow
@pytest.mark.extended
def test_warm_up_from_a_read_only_package(tmp_path):
    package = tmp_path / "site" / "think_vllm"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(think_vllm.__file__).parent, package, ignore=ignore)
    # Not even root can make __pycache__ where a file has that name.
    (package / "kernels" / "cpu" / "__pycache__").write_text("in the way")
    environment = os.environ | {
        "PYTHONPATH": str(package.parent),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    results = []
    for _ in range(2):
        done = run_python("-c", WARM_UP, env=environment, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        results.append(done.stdout.strip().split("|"))
    for module, cache, _ in results:
        assert Path(module).is_relative_to(package)
        assert Path(cache).is_relative_to(tmp_path / "cache")
    assert [int(hits) for _, _, hits in results] == [0, 1]
