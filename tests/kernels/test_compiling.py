"""The cache of compiled kernels: what is loaded is what was asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from think_vllm.kernels.cpu.compiling import _CacheFile


def cache_file(folder: Path, sources: str = "a") -> _CacheFile:
    return _CacheFile(str(folder), "kernel-1.py311", sources)


def test_cache_file_keeps_what_two_processes_save_at_once(tmp_path: Path) -> None:
    # Both start from an empty cache; numba's own numbering would give both the same file.
    one, other = cache_file(tmp_path), cache_file(tmp_path)
    assert one.load("int8") is None
    assert other.load("int16") is None
    one.save("int8", "code for int8")
    other.save("int16", "code for int16")
    for file in (one, other, cache_file(tmp_path)):
        assert file.load("int8") == "code for int8"
        assert file.load("int16") == "code for int16"


def test_cache_file_of_other_sources_is_not_loaded(tmp_path: Path) -> None:
    cache_file(tmp_path, "a").save("int8", "old")
    assert cache_file(tmp_path, "b").load("int8") is None
    cache_file(tmp_path, "b").save("int8", "new")
    assert cache_file(tmp_path, "a").load("int8") == "old"
    assert cache_file(tmp_path, "b").load("int8") == "new"


COMPARE = """
import sys, torch
from tests.kernels.helpers import make_case, make_plan
from tests.kernels.test_compaction import test_compact_spans_codes_to_the_bit as compact
from tests.kernels.test_decode import check
for quant in sys.argv[1:]:
    compact(torch.float32, quant, 0.5, 64, "usual")
    plan = make_plan(64, torch.float32, None, 0.5, quant)
    check(make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)]))
"""


@pytest.mark.slow
def test_formats_that_other_processes_compiled_do_not_mix(tmp_path: Path) -> None:
    # Each format is compiled in a process of its own, as servers do; the last one loads both.
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for formats in (["kivi4"], ["kivi2"], ["kivi4", "kivi2"], ["kivi2", "kivi4"]):
        done = subprocess.run(
            [sys.executable, "-c", COMPARE, *formats],
            env=environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
