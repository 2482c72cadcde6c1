"""Which binaries of kernels Triton would look for, without a GPU and without compiling any."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

#: A kernel, what Triton knows of its arguments when it compiles, and its options.
Binary = tuple[str, str, str]


@contextmanager
def record_binaries() -> Iterator[set[Binary]]:
    """Collect the binaries of all kernels that are launched in Triton's interpreter."""
    binaries: set[Binary] = set()
    run = InterpretedFunction.run

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        _, specialization, options = _binder(kernel)(*args, **kwargs)
        where = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
        names = kernel.arg_names
        known = ", ".join(f"{n}={kind}" for n, kind in zip(names, specialization, strict=True))
        binaries.add((where, known, str(sorted(options.items()))))
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    with patch.object(InterpretedFunction, "run", record):
        yield binaries


@cache
def _binder(kernel: InterpretedFunction) -> Any:
    """What Triton makes of a launch's arguments on an H100, as it does on one."""
    compiled = JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(compiled.signature, compiled.params, backend)
