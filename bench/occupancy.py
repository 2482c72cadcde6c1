"""How many programs a multiprocessor holds, and what its instruction rate leaves of bandwidth."""

from dataclasses import dataclass

THREADS_PER_WARP = 32
#: Registers are given to whole warps in pieces of this many, and to warps in each of 4 partitions.
REGISTERS_PER_PIECE = 256
PARTITIONS = 4
#: Shared memory comes in pieces of this many bytes; a program takes this much more for the system.
SHARED_PIECE = 128
SHARED_RESERVED = 1024


@dataclass(frozen=True)
class Multiprocessor:
    """One multiprocessor of a GPU, and its share of the memory's bandwidth."""

    name: str  # of the GPU whose clock and bandwidth these are
    registers: int  # of 32 bits
    shared_bytes: int  # of all its programs together
    threads: int  # most that are resident
    programs: int  # most that are resident, whatever they take
    count: int  # multiprocessors of the GPU
    clock: float  # cycles per second under load, assumed
    bandwidth: float  # bytes per second that a copy reaches on the GPU, assumed
    #: Warp instructions a cycle that code of this kind reaches, of 4 at most, assumed.
    issue: float = 2.0

    @property
    def bytes_per_cycle(self) -> float:
        """Share of the bandwidth."""
        return self.bandwidth / (self.count * self.clock)


#: By compute capability. Sizes are those of the CUDA programming guide.
MULTIPROCESSORS = {
    80: Multiprocessor("A100 80 GB", 65536, 164 * 1024, 2048, 32, 108, 1.35e9, 1.75e12),
    90: Multiprocessor("H100 SXM", 65536, 228 * 1024, 2048, 32, 132, 1.70e9, 3.00e12),
}


def occupancy(on: Multiprocessor, registers: int, shared_bytes: int, warps: int) -> dict[str, int]:
    """Programs that fit, by what limits them: as many are resident as the smallest allows.

    Raises:
        ValueError: If registers or warps are not positive.
    """
    if registers < 1 or warps < 1:
        raise ValueError(f"{registers} registers and {warps} warps; expected at least 1 of each")
    of_warp = _round_up(registers * THREADS_PER_WARP, REGISTERS_PER_PIECE)
    warps_held = on.registers // PARTITIONS // of_warp * PARTITIONS
    shared = _round_up(shared_bytes + SHARED_RESERVED, SHARED_PIECE)
    return {
        "by_registers": warps_held // warps,
        "by_shared_memory": on.shared_bytes // shared,
        "by_threads": on.threads // (warps * THREADS_PER_WARP),
        "by_count": on.programs,
    }


def byte_ideal_share(on: Multiprocessor, instructions: float, num_bytes: float) -> float:
    """Most of the bandwidth that the instruction rate leaves, 1 at most.

    A bound, not a forecast: it knows nothing of waiting for memory, barriers and bank conflicts.

    Args:
        on: The multiprocessor.
        instructions: Warp instructions for a piece of work, positive.
        num_bytes: That the same piece reads.
    """
    cycles = instructions / on.issue
    return min(1.0, num_bytes / on.bytes_per_cycle / cycles)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
