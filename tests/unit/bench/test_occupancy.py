"""Programs of a multiprocessor, against the CUDA occupancy calculator's figures."""

import pytest

from bench.occupancy import MULTIPROCESSORS, byte_ideal_share, occupancy


@pytest.mark.parametrize(
    ("capability", "registers", "shared", "warps", "programs"),
    [
        (80, 32, 0, 4, 16),  # by threads
        (80, 32, 0, 1, 32),  # by count
        (80, 168, 21504, 4, 3),  # by registers, which come in pieces of 8 for a thread
        (80, 169, 0, 4, 2),
        (80, 255, 0, 8, 1),
        (80, 64, 81 * 1024, 4, 2),  # by shared memory, 1 KiB of each program reserved
        (80, 64, 82 * 1024, 4, 1),
        (90, 64, 113 * 1024, 4, 2),
        (90, 64, 227 * 1024, 4, 1),
    ],
)
def test_programs(capability: int, registers: int, shared: int, warps: int, programs: int) -> None:
    held = occupancy(MULTIPROCESSORS[capability], registers, shared, warps)
    assert min(held.values()) == programs


def test_impossible_programs_are_rejected() -> None:
    with pytest.raises(ValueError, match="0 registers"):
        occupancy(MULTIPROCESSORS[90], 0, 0, 4)


def test_share_of_the_bandwidth() -> None:
    h100 = MULTIPROCESSORS[90]
    assert h100.bytes_per_cycle == pytest.approx(13.37, abs=0.01)
    # 20 cycles of instructions for 10 cycles of bytes.
    assert byte_ideal_share(h100, 40, 10 * h100.bytes_per_cycle) == pytest.approx(0.5)
    assert byte_ideal_share(h100, 1, 1000) == 1.0
