"""The few instructions of inline assembly that kernels use, run on arrays: there may be no GPU."""

import re
from collections.abc import Sequence

import numpy as np

#: lop3's inputs as they would be in its truth table.
_A, _B, _C = 0xF0, 0xCC, 0xAA


def run(text: str, num_outputs: int, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Run a block of instructions.

    Args:
        text: With ``$0`` .. for outputs, then inputs.
        num_outputs: Of the text: 16-bit halves, or one 32-bit register.
        inputs: uint32 arrays of one shape.

    Raises:
        ValueError: If there is an instruction that is not known here.
    """
    registers = {f"${num_outputs + i}": values for i, values in enumerate(inputs)}

    def read(name: str) -> np.ndarray:
        if re.fullmatch(r"0x[0-9a-f]+|\d+", name):
            return np.full_like(inputs[0], int(name, 0))
        return registers[name]

    for statement in text.strip().strip("{}").split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        halves = re.fullmatch(r"\{(\$\d+), (\$\d+)\}, (\w+)", words[1].strip())
        if words[0] == "mov.b32" and halves:
            low, high, source = halves.groups()
            registers[low], registers[high] = read(source) & 0xFFFF, read(source) >> 16
            continue
        target, *sources = (name.strip() for name in words[1].split(","))
        registers[target] = _run_one(words[0], [read(name) for name in sources])
    return [registers[f"${i}"] for i in range(num_outputs)]


def _run_one(name: str, sources: list[np.ndarray]) -> np.ndarray:
    if name == "shl.b32":
        return sources[0] << sources[1]
    if name == "shr.u32":
        return sources[0] >> sources[1]
    if name == "and.b32":
        return sources[0] & sources[1]
    if name == "lop3.b32":
        table = int(sources[3].flat[0])
        # Only (a & b) | c is in use.
        if table != (_A & _B | _C):
            raise ValueError(f"ptx: lop3 with table {table:#x} is not known here")
        return sources[0] & sources[1] | sources[2]
    if name == "fma.rn.f16x2":
        a, b, c = (source.view(np.float16).astype(np.float64) for source in sources)
        return (a * b + c).astype(np.float16).view(np.uint32)
    raise ValueError(f"ptx: {name} is not known here")
