"""The cache of compiled kernels: what is loaded is what was asked for."""

import errno
import importlib.util
import logging
import os
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba.core import caching

from tests.conftest import REPOSITORY
from tests.support.processes import run_python
from think_vllm.kernels.cpu import compiling
from think_vllm.kernels.cpu.compiling import _CacheFile


def cache_file(folder: Path, sources: str = "a") -> _CacheFile:
    return _CacheFile(str(folder), "kernel-1.py311", sources)


def test_cache_file_keeps_what_two_processes_save_at_once(tmp_path):
    # Both start from an empty cache; numba's own numbering would give both the same file.
    one, other = cache_file(tmp_path), cache_file(tmp_path)
    assert one.load("int8") is None
    assert other.load("int16") is None
    one.save("int8", "code for int8")
    other.save("int16", "code for int16")
    for file in (one, other, cache_file(tmp_path)):
        assert file.load("int8") == "code for int8"
        assert file.load("int16") == "code for int16"


def test_cache_file_of_other_sources_is_not_loaded(tmp_path):
    cache_file(tmp_path, "a").save("int8", "old")
    assert cache_file(tmp_path, "b").load("int8") is None
    cache_file(tmp_path, "b").save("int8", "new")
    assert cache_file(tmp_path, "a").load("int8") == "old"
    assert cache_file(tmp_path, "b").load("int8") == "new"


PROGRAM = """
from think_vllm.kernels.cpu.compiling import kernel

@kernel()
def fill(out):
    out[:] = 7
"""


class Installation:
    """A package whose folder can be written to or not, a home and a folder that the user names."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.program = root / "package" / "program.py"
        self.program.parent.mkdir()
        self.program.write_text(PROGRAM)
        self.closed: list[Path] = []
        self.folders = {"package": self.program.parent / "__pycache__"}
        for name in ("home", "named"):
            self.folders[name] = root / name
            self.folders[name].mkdir()
        patch.setenv("XDG_CACHE_HOME", str(self.folders["home"]))
        patch.setenv("HOME", str(self.folders["home"]))
        self._patch = patch
        self.open_file, self.open_stream = caching.tempfile.TemporaryFile, open
        patch.setattr(caching.tempfile, "TemporaryFile", self._temporary)
        self.make_folders = os.makedirs
        patch.setattr(caching.os, "makedirs", self._make)
        patch.setattr(caching, "open", self._open, raising=False)

    def close(self, *names: str) -> None:
        """From now on these folders can be read only, as on another file system."""
        self.closed += [self.folders[name] for name in names]

    def name(self, folder: Path | str) -> None:
        self._patch.setattr(numba.config, "CACHE_DIR", str(folder))

    def run(self) -> int:
        """Call the kernel as a new process does; 1 if it was compiled, 0 if loaded."""
        self._patch.setattr(compiling, "_has_warned", False)
        spec = importlib.util.spec_from_file_location("program", self.program)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out = np.zeros(3, np.uint8)
        module.fill(out)
        assert out.tolist() == [7, 7, 7]
        return int(not module.fill.stats.cache_hits)

    def _check(self, path: Any) -> None:
        if any(Path(path).is_relative_to(folder) for folder in self.closed):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def _make(self, path: Any, *args: Any, **kwargs: Any) -> None:
        if not Path(path).exists():
            self._check(path)
        self.make_folders(path, *args, **kwargs)

    def _temporary(self, **kwargs: Any) -> Any:
        self._check(kwargs["dir"])
        return self.open_file(**kwargs)

    def _open(self, path: Any, mode: str = "r") -> Any:
        if "w" in mode:
            self._check(path)
        return self.open_stream(path, mode)


@pytest.fixture
def installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Installation:
    caplog.set_level(logging.WARNING, "vllm.think_vllm")
    return Installation(tmp_path, monkeypatch)


@pytest.mark.parametrize("place", ["package", "home", "named"])
def test_kernels_are_loaded_from_a_warm_cache_that_is_read_only(installation, place, caplog):
    if place == "named":
        installation.name(installation.folders["named"])
    if place == "home":
        # Where nothing can be kept beside a package, not even Python's own files.
        installation.folders["package"].write_text("no folder")
    assert installation.run() == 1
    installation.close("package", "home", "named")
    assert installation.run() == 0
    assert caplog.records == []


@pytest.mark.parametrize("place", ["named", "package"])
def test_a_warm_cache_that_is_read_only_is_loaded_from_beside_one_that_is_not(
    installation, place, caplog
):
    if place == "named":
        installation.name(installation.folders["named"])
    assert installation.run() == 1
    installation.close(place)
    assert installation.run() == 0
    assert caplog.records == []
    # A folder that can be written is not mixed with those behind it.
    installation.name(installation.folders["home"])
    assert installation.run() == 1


def test_reasons_that_differ_give_one_warning(installation, caplog):
    installation.run()
    compiling._warn_of_compiling("no space for a")
    compiling._warn_of_compiling("no space for b")
    assert [record.args for record in caplog.records] == [("no space for a",)]


@pytest.mark.parametrize(
    "named", ["", "named", "/proc/nope/cache"], ids=["unset", "read-only", "impossible"]
)
@pytest.mark.parametrize("has_folder", [True, False])
def test_kernels_are_compiled_anew_where_nothing_can_be_written(
    installation, named, has_folder, caplog
):
    if has_folder:
        installation.folders["package"].mkdir()
    installation.close("package", "home", "named")
    installation.name(installation.folders.get(named, named) if named else "")
    for _ in range(2):
        caplog.clear()
        assert installation.run() == 1
        (record,) = caplog.records
        assert "set NUMBA_CACHE_DIR to a folder" in record.getMessage()


def test_a_disk_that_fills_up_ends_nothing(installation, monkeypatch, caplog):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "_save_data", full)
    assert installation.run() == 1
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()


COMPARE = """
import sys, torch
from tests.kernels.helpers import make_case, make_plan
from tests.kernels.test_compaction import check as check_compaction
from tests.kernels.test_decode import check
for quant in sys.argv[1:]:
    plan = make_plan(64, torch.float32, None, 0.5, quant)
    check_compaction(plan, torch.float32, "usual")
    check(make_case(plan, torch.float32, 4, 2, [(plan.span_tokens + 9, 1)]))
"""


@pytest.mark.slow
@pytest.mark.extended
def test_formats_that_other_processes_compiled_do_not_mix(tmp_path):
    # Each format is compiled in a process of its own, as servers do; the last one loads both.
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for formats in (["kivi4"], ["kivi2"], ["kivi4", "kivi2"], ["kivi2", "kivi4"]):
        done = run_python("-c", COMPARE, *formats, env=environment, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-3000:]
