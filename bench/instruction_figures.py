"""What ``bench/instructions.py`` counts, and the tables that it prints."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from bench.occupancy import MULTIPROCESSORS, byte_ideal_share
from bench.sass import KINDS, load_bits
from think_vllm.tools.common.markdown import table


@dataclass(frozen=True)
class Figures:
    """What was counted of one format on one GPU."""

    format: str  # of the blocks
    capability: int  # compute capability, such as 90
    instructions: dict[str, float]  # warp instructions per token and KV head, by kind
    bytes: float  # per token and KV head: codes, scales and channel table
    tokens: int  # that one iteration of the loop covers
    loads: dict[str, int]  # opcode of each load in the loop, how often an iteration runs it
    #: Bits that a thread moves with each load of codes or elements, how often.
    code_load_bits: dict[int, int]
    other_loops: list[int]  # instructions of further innermost loops over thin blocks, not counted
    registers: int  # of a thread
    spill_bytes: int  # of a thread
    shared_bytes: int  # of a program
    warps: int  # of a program
    occupancy: dict[str, int]  # programs that a multiprocessor holds, by limit

    @property
    def total(self) -> float:
        """Warp instructions per token and KV head, of all kinds."""
        return sum(self.instructions.values())

    @property
    def programs(self) -> int:
        """Programs that are resident at once."""
        return min(self.occupancy.values())

    @property
    def share(self) -> float:
        """Most of the bandwidth that the instruction rate leaves."""
        return byte_ideal_share(MULTIPROCESSORS[self.capability], self.total, self.bytes)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        derived = {"total": self.total, "share": self.share, "programs": self.programs}
        return asdict(self) | derived


def write_table(figures: Iterable[Figures]) -> str:
    """Everything as Markdown."""
    rows = list(figures)
    gpus = [(f.format, f"sm_{f.capability}") for f in rows]
    counts = table(
        ["format", "GPU", "total", *KINDS],
        [
            [*gpu, f"{f.total:.1f}", *(f"{f.instructions[kind]:.1f}" for kind in KINDS)]
            for gpu, f in zip(gpus, rows, strict=True)
        ],
    )
    takes = table(
        ["format", "GPU", "tokens a tile", "registers", "spill bytes", "shared bytes", "warps",
         "programs by registers / shared memory / threads / count", "warps resident",
         "bytes per token and head", "share of the byte ideal, at most"],
        [
            [*gpu, f.tokens, f.registers, f.spill_bytes, f.shared_bytes, f.warps,
             " / ".join(map(str, f.occupancy.values())), f.programs * f.warps,
             f"{f.bytes:.0f}", f"{100 * f.share:.0f} %"]
            for gpu, f in zip(gpus, rows, strict=True)
        ],
    )  # fmt: skip
    loads = table(
        ["format", "GPU", "codes", "all"],
        [
            [
                *gpu,
                ", ".join(f"{times} x {bits}" for bits, times in f.code_load_bits.items()),
                _loads(f.loads),
            ]
            for gpu, f in zip(gpus, rows, strict=True)
        ],
    )
    text = (
        f"Warp instructions per token and KV head in the loop over thin blocks:\n\n{counts}\n\n"
        f"What a program takes, and what the instruction rate leaves of the bandwidth:\n\n{takes}"
        f"\n\nLoads of an iteration, by bits of a thread:\n\n{loads}\n"
    )
    for gpu, f in zip(gpus, rows, strict=True):
        if f.other_loops:
            text += f"\n{', '.join(gpu)}: further loops, not counted: {f.other_loops}\n"
    return text


def _loads(loads: dict[str, int]) -> str:
    return ", ".join(f"{times} x {opcode} ({load_bits(opcode)})" for opcode, times in loads.items())


def assumptions(capabilities: Iterable[int]) -> str:
    """What the shares rest on."""
    text = ""
    for capability in capabilities:
        on = MULTIPROCESSORS[capability]
        text += (
            f"* sm_{capability} ({on.name}): {on.registers} registers, {on.shared_bytes} bytes of "
            f"shared memory, {on.threads} threads and {on.programs} programs a multiprocessor. "
            f"Assumed: {on.bandwidth / 1e12:.2f} TB/s, {on.count} multiprocessors at "
            f"{on.clock / 1e9:.2f} GHz, so {on.bytes_per_cycle:.1f} bytes a cycle each, and "
            f"{on.issue:g} warp instructions a cycle.\n"
        )
    return text
