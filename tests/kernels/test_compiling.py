"""The cache of compiled kernels: what is loaded is what was asked for."""

from pathlib import Path

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
