"""How many threads run a kernel, and how they share the work.

numba's ``prange`` gives every thread an equal share up front. Contexts and cores are uneven,
so a kernel instead starts one worker per thread, and workers draw items from a counter.
"""

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic

#: Below this many multiply-adds (about 20 us) waking threads costs more than it saves.
SERIAL_WORK = 1 << 20

_serial_work = SERIAL_WORK


@functools.cache
def use_openmp() -> None:
    """Let numba run on the OpenMP threads that torch already has, if it can.

    Two pools would take turns spinning on the same cores. Opening torch's own libgomp with
    global visibility makes numba's OpenMP layer bind to it, provided that this happens
    before numba starts its first thread; the pinning of the threads then holds as well.
    Without OpenMP numba falls back to its work queue.
    """
    library = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if numba.config.THREADING_LAYER == "default":
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


@contextmanager
def serial_below(work: int) -> Iterator[None]:
    """Move the limit below which calls run serially: 0 makes all of them parallel."""
    global _serial_work
    before, _serial_work = _serial_work, work
    try:
        yield
    finally:
        _serial_work = before


def choose_threads(work: int) -> int:
    """Set numba's threads for a call.

    Args:
        work: Multiply-adds, or elements moved.

    Returns:
        torch's number of threads, at most numba's limit; 1 if the work is small.
    """
    if work < _serial_work:
        return 1
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if threads > 1:
        numba.set_num_threads(threads)
    return int(threads)


@intrinsic
def fetch_add(typingctx: Any, counters: Any, index: Any) -> Any:
    """``fetch_add(counters, index)``: add 1 to an int64 atomically, return the old value.

    Acquires and releases: who draws the last number sees what the others wrote before.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        return builder.atomic_rmw("add", pointer, context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counters, types.int64), codegen
