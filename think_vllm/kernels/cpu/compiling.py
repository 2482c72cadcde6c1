"""How kernels are compiled: numba, with a cache on disk that notices every change."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


@functools.cache
def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def kernel(**options: Any) -> Callable[[Callable[..., None]], Any]:
    """Compile a function on its first call, or load it from numba's cache on disk.

    numba's own check is blind to helpers: it compares the file that holds the function, and
    would go on using code compiled from older helpers in other files. Here a change anywhere
    in this directory makes the cache stale.

    Args:
        options: Of ``numba.njit``.
    """

    def compile_lazily(function: Callable[..., None]) -> Any:
        dispatcher = njit(**options)(function)
        dispatcher.enable_caching()
        dispatcher._cache._cache_file._source_stamp = _sources()
        return dispatcher

    return compile_lazily
