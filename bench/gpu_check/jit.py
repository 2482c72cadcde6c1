"""Compilations of Triton kernels, counted by Triton's own hook."""

from collections import Counter
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import triton


class CompilationCounter(AbstractContextManager["CompilationCounter"]):
    """Counts what Triton compiles, or loads from its cache on disk, while it is entered.

    Either keeps everybody waiting. A hook that was set before is still called.

    Attributes:
        kernels: How often each kernel, ``module.name``, was compiled.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self._before: Any = None

    def __enter__(self) -> "CompilationCounter":
        self._before = triton.knobs.runtime.jit_post_compile_hook
        triton.knobs.runtime.jit_post_compile_hook = self._count
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        triton.knobs.runtime.jit_post_compile_hook = self._before

    def _count(self, **told: Any) -> Any:
        kernel = told.get("fn")
        module, name = getattr(kernel, "module", ""), getattr(kernel, "name", "unknown")
        self.kernels[f"{module}.{name}".lstrip(".")] += 1
        return self._before(**told) if self._before is not None else None
