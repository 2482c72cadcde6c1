"""How many threads run a kernel, and how they share the work.

numba's ``prange`` gives every thread an equal share up front. Contexts and cores are uneven,
so a kernel instead starts one worker per thread, and workers draw items from a counter.

Two OpenMP pools would take turns spinning on the same cores. In vLLM's workers there is one:
vLLM preloads torch's libgomp on CPUs, and numba's OpenMP layer binds to it.
"""

import functools
from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic
from numba.np.ufunc import parallel

#: Below this many multiply-adds (about 20 us) waking threads costs more than it saves.
SERIAL_WORK = 1 << 20


def choose_threads(work: int) -> int:
    """Set numba's threads for a call.

    Args:
        work: Multiply-adds, or elements moved.

    Returns:
        torch's number of threads, at most numba's limit; 1 if the work is small.
    """
    _start_threads()
    if work < SERIAL_WORK:
        return 1
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    return int(threads)


@functools.cache
def _start_threads() -> None:
    """Start numba with as many threads as torch has, and leave torch's number alone.

    numba counts the cores of the thread that imports it, and on its start makes that count
    OpenMP's number of threads. vLLM binds that thread to one core: torch and vLLM's own kernels
    would be left with a single thread, as would ours. numba reads the count when it is
    imported, long before us, so it is corrected where it is kept.
    """
    if parallel._is_initialized:
        return  # other code has started numba; its number stands
    threads = torch.get_num_threads()
    numba.config.NUMBA_NUM_THREADS = threads
    parallel.NUM_THREADS = threads
    parallel.snt_check = parallel.gen_snt_check()
    numba.set_num_threads(threads)


@intrinsic
def fetch_add(typingctx, counters, index):
    """``fetch_add(counters, index)``: add 1 to an int64 atomically, return the old value.

    Acquires and releases: who draws the last number sees what the others wrote before.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        pointer = builder.gep(array.data, [args[1]])
        return builder.atomic_rmw("add", pointer, context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counters, types.int64), codegen
