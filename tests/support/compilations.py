"""Which binaries of kernels Triton would look for, without a GPU and without compiling any."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

#: A kernel, what Triton knows of its arguments when it compiles, and its options.
Binary = tuple[str, str, str]


@contextmanager
def record_binaries() -> Iterator[set[Binary]]:
    """Collect the binaries of all kernels that are launched, in the interpreter or on a GPU."""
    binaries: set[Binary] = set()
    kind = InterpretedFunction if triton.knobs.runtime.interpret else JITFunction
    run = kind.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        _, specialization, options = _binder(kernel)(*args, **kwargs)
        names = kernel.arg_names
        known = ", ".join(f"{n}={kind}" for n, kind in zip(names, specialization, strict=True))
        binaries.add((full_name(kernel), known, str(sorted(options.items()))))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with patch.object(kind, "run", record):
        yield binaries


def full_name(kernel: Any) -> str:
    """Module and name of a kernel."""
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


@cache
def as_compiled(kernel: Any) -> JITFunction:
    """A kernel as Triton has it where it compiles: here it may be one of the interpreter's."""
    return kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)


@cache
def _binder(kernel: Any) -> Any:
    """What Triton makes of a launch's arguments on an H100, as it does on one."""
    compiled = as_compiled(kernel)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(compiled.signature, compiled.params, backend)
