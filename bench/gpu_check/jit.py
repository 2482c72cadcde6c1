"""Compilations of Triton kernels, counted by Triton's own hook."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton


@contextmanager
def counted_compilations() -> Iterator[Counter[str]]:
    """Count what Triton compiles, or loads from its cache on disk, in the block.

    Either keeps all requests waiting. A hook that was set before is still called.

    Yields:
        How often each kernel, ``module.name``, was compiled so far.
    """
    kernels: Counter[str] = Counter()
    before = triton.knobs.runtime.jit_post_compile_hook

    def count(**told: Any) -> Any:
        kernel = told.get("fn")
        module, name = getattr(kernel, "module", ""), getattr(kernel, "name", "unknown")
        kernels[f"{module}.{name}".lstrip(".")] += 1
        return before(**told) if before is not None else None

    triton.knobs.runtime.jit_post_compile_hook = count
    try:
        yield kernels
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
