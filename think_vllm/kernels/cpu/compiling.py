"""How kernels are compiled: numba, with a cache on disk that notices every change."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import IndexDataCacheFile


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _CacheFile(IndexDataCacheFile):
    """One file per kernel, sources and types, named after all three.

    numba numbers its files and keeps an index. Of two processes that add to the index at once,
    one can be left with the other's machine code for its types: servers with different formats
    that start side by side on a fresh machine. And numba's own check is blind to helpers: it
    compares the file that holds the function alone; here a change anywhere in this directory
    makes a new name.
    """

    def _name(self, key: Any) -> str:
        # The key holds the types, the processor and the function's bytecode.
        digest = hashlib.sha256(repr((self._version, self._source_stamp, key)).encode())
        stem = self._index_name.removesuffix(".nbi")
        return f"{stem}.{self._source_stamp[:12]}-{digest.hexdigest()[:20]}.nbc"

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name(key), data)

    def load(self, key: Any) -> Any:
        try:
            return self._load_data(self._name(key))
        except FileNotFoundError:
            return None

    def flush(self) -> None:
        """Nothing is ever stale under its name."""


def named(suffix: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that a factory makes a name of its own, before numba sees it.

    numba tells functions of one name apart by numbers that it counts per process. Code from the
    cache on disk was counted in other processes, so two formats loaded side by side could call
    each other's helpers.
    """

    def rename(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__name__ = function.__qualname__ = f"{function.__name__}_{suffix}"
        return function

    return rename


def kernel(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a function on its first call, or load it from the cache on disk.

    Args:
        options: Of ``numba.njit``.
    """

    def compile_lazily(function: Callable[..., None]) -> Any:
        dispatcher = njit(**options)(function)
        dispatcher.enable_caching()
        cache = dispatcher._cache
        file = cache._cache_file
        cache._cache_file = _CacheFile(file._cache_path, _stem(file), _sources())
        return dispatcher

    return compile_lazily


def _stem(file: Any) -> str:
    name: str = file._index_name
    return name.removesuffix(".nbi")
