"""How kernels are compiled: numba, with a cache on disk that notices every change."""

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from numba import njit
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
        except OSError:  # not there, or not ours to read
            return None

    def flush(self) -> None:
        """Nothing is ever stale under its name."""


class _ReadOnly:
    """A locator that takes a folder with compiled kernels, whether or not it can be written to."""

    def ensure_cache_path(self) -> None:
        path = Path(self.get_cache_path())  # type: ignore[attr-defined]
        if not any(path.glob("*.nbc")):
            raise OSError(f"{path} has no compiled kernels")


class _ReadOnlyProvided(_ReadOnly, UserProvidedCacheLocator):
    """``NUMBA_CACHE_DIR``."""


class _ReadOnlyInTree(_ReadOnly, InTreeCacheLocator):
    """Beside this package."""


class _ReadOnlyUserWide(_ReadOnly, UserWideCacheLocator):
    """Below the user's home."""


class _Implementation(CompileResultCacheImpl):
    """Numba's, which also finds folders that can only be read, if there is no other."""

    _locator_classes: ClassVar = [
        *CompileResultCacheImpl._locator_classes,
        _ReadOnlyProvided,
        _ReadOnlyUserWide,
        _ReadOnlyInTree,
    ]


class _Cache(FunctionCache):
    """A kernel's cache on disk. What cannot be kept there is compiled anew at every start."""

    _impl_class = _Implementation

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        stem = self._impl.filename_base
        self._cache_file = _CacheFile(self._cache_path, stem, _sources())

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_of_compiling(str(error))


@functools.cache  # once for all kernels: they fail alike
def _warn_of_compiling(reason: str) -> None:
    logger.warning(
        "think-vllm: compiled CPU kernels cannot be kept (%s), so each start compiles them, for a "
        "minute or more; set NUMBA_CACHE_DIR to a folder that this process may write to",
        reason,
    )


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
