"""How kernels are compiled: numba, with a cache on disk that notices every change."""

import functools
import hashlib
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from numba import config, njit
from numba.core.caching import (
    CompileResultCacheImpl,
    FunctionCache,
    IndexDataCacheFile,
    InTreeCacheLocator,
    UserProvidedCacheLocator,
    UserWideCacheLocator,
)

logger = logging.getLogger("vllm.think_vllm")


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

    Args:
        folder: Where files are written.
        stem: How their names begin.
        sources: What they were compiled from.
        preferred: Folders that are read first.
    """

    def __init__(self, folder: str, stem: str, sources: str, preferred: Sequence[str] = ()) -> None:
        super().__init__(folder, stem, sources)
        self._folders = [Path(place).absolute() for place in (*preferred, folder)]

    def _name(self, key: Any) -> str:
        # The key holds the types, the processor and the function's bytecode.
        digest = hashlib.sha256(repr((self._version, self._source_stamp, key)).encode())
        stem = self._index_name.removesuffix(".nbi")
        return f"{stem}.{self._source_stamp[:12]}-{digest.hexdigest()[:20]}.nbc"

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self._name(key), data)

    def load(self, key: Any) -> Any:
        for folder in self._folders:
            try:
                return self._load_data(folder / self._name(key))
            except OSError:
                continue  # not there, or not ours to read
        return None

    def flush(self) -> None:
        """Nothing is ever stale under its name."""


class _ReadOnlyLocator(InTreeCacheLocator):
    """Where nothing can be written: an attempt fails, and says why."""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Any:
        return cls(py_func, py_file)


class _Implementation(CompileResultCacheImpl):
    """Numba's, which also finds a place where nothing can be written."""

    _locator_classes: ClassVar = [*CompileResultCacheImpl._locator_classes, _ReadOnlyLocator]


class _Cache(FunctionCache):
    """A kernel's cache on disk. What cannot be kept there is compiled again at every start.

    numba reads where it writes. Here kernels are loaded also from the folders that it would prefer
    but cannot write to: those of a read-only image, compiled when it was built.
    """

    _impl_class = _Implementation

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        stem = self._impl.filename_base
        preferred = _preferred_folders(function, self._impl.locator)
        self._cache_file = _CacheFile(self._cache_path, stem, _sources(), preferred)

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_of_compiling(str(error))


def _preferred_folders(function: Callable[..., None], locator: Any) -> list[str]:
    """Folders that come before a locator's, in numba's order; all if it cannot write either."""
    source = inspect.getfile(function)
    places = [InTreeCacheLocator, UserWideCacheLocator]
    if config.CACHE_DIR:
        places.insert(0, UserProvidedCacheLocator)
    if type(locator) in places:
        places = places[: places.index(type(locator))]
    return [place(function, source).get_cache_path() for place in places]


_has_warned = False


def _warn_of_compiling(reason: str) -> None:
    """Warn once for all kernels, whose reasons may name different files."""
    global _has_warned
    if not _has_warned:
        logger.warning(
            "think-vllm: compiled CPU kernels cannot be kept (%s), so each start compiles them, "
            "for a minute or more; set NUMBA_CACHE_DIR to a folder that this process may write to",
            reason,
        )
    _has_warned = True


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
        try:
            dispatcher._cache = _Cache(function)
        except RuntimeError:  # numba found no folder
            _warn_of_compiling("no folder beside the package or below the home can be written to")
        return dispatcher

    return compile_lazily
