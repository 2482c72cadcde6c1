"""Machine code of NVIDIA GPUs as ``nvdisasm`` and ``cuobjdump -sass`` print it: loops and kinds.

Pure functions over text. Nothing here needs a GPU, CUDA or Triton.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

#: Opcodes, without modifiers, of each kind of instruction that tables have.
_OPCODES = {
    "tensor": r"\w+MMA",
    "float": r"[FD](ADD|MUL|FMA|MNMX|SEL|SET|SETP|CHK|SWZADD)(2|3|32I)?"
    r"|H(ADD|MUL|FMA|SET|SETP|MNMX)2(_32I)?|MUFU|RRO",
    "integer": r"I(ADD|MAD|MUL|MNMX|SCADD|SET|SETP|ABS|DP)(2|3|32I)?|VI(ADD|MNMX)(MNMX|3)?|LEA"
    r"|LOP(3|32I)?|SH[FLR]|SEL|PRMT|MOV(32I|M)?|SGXT|BMSK|BREV|FLO|POPC|P(LOP3|SETP)|P2R|R2P"
    r"|VABSDIFF4?|VHMNMX|CS2R|R2UR(_OR)?|S2U?R|VOTEU?",
    "conversion": r"[FI]2[FI]P?|FRND",
    "shared memory": r"(LD|ST)SM?|ATOMS",
    "global memory": r"(LD|ST)[GL]?|LDGSTS|ATOMG?|REDG?|CCTLL?|UBLK(CP|PF)|UTMA(LDG|STG|PF|REDG)",
    "barrier": r"BAR|B2R|(LDG)?DEPBAR|MEMBAR|ERRBAR|FENCE|SYNCS|WARPGROUP|WARPSYNC|ARRIVES"
    r"|UCGABAR_(ARV|WAIT)|UTMACMDFLUSH|ACQBULK",
    "shuffle": r"SHFL|MATCH|C?REDUX",
}
#: All kinds, in the order of tables.
KINDS = (*_OPCODES, "other")
_LABEL = re.compile(r"^\s*(\.L\w*)\s*:")
_LINE = re.compile(r'^\s*//## File "[^"]*", line (\d+)')
_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-fA-F]{4,})\*/\s+(?:\{\s*)?(?:@(?P<predicate>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)
_TARGET = re.compile(r"(?:`\((?P<label>\.L\w*)\)|(?P<bare>\.L\w+)|(?P<address>0x[0-9a-fA-F]+))$")
_BRANCHES = ("BRA", "JMP")
#: Nothing runs behind these unless they are predicated.
_ENDS = ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMXU", "KILL", "BREAK")

_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


@dataclass(frozen=True)
class Instruction:
    """One machine instruction."""

    address: int  # bytes from the start of the kernel
    opcode: str  # with its modifiers, such as ``LDG.E.128``
    operands: str  # as printed
    predicate: str  # register that decides whether it runs, with ``!`` if negated; empty for none
    line: int | None  # source line that the text attributes it to, None without line information
    target: int | None  # index of the instruction that a branch goes to; None for everything else

    @property
    def base(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.split(".")[0]

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may run after it."""
        if self.base not in (*_BRANCHES, *_ENDS):
            return True
        # A condition is a predicate in front (``@P0 BRA``) or, in newer forms, an operand
        # (``BRA.U UP0, ...``, ``BRA.DIV UR4, ...``).
        return bool(self.predicate) or (self.base in _BRANCHES and "," in self.operands)


@dataclass(frozen=True)
class Loop:
    """A natural loop: whatever runs between entering at ``header`` and going back there."""

    header: int  # index of its first instruction
    body: frozenset[int]  # indices of all its instructions, those of inner loops included


def parse(text: str) -> list[Instruction]:
    """Instructions of one kernel, in order.

    Args:
        text: What ``nvdisasm -c`` (with ``-g`` for source lines) or ``cuobjdump -sass`` prints.

    Raises:
        ValueError: If there is no instruction, or a branch goes to a place that is not there.
    """
    found: list[tuple[re.Match[str], int | None]] = []
    labels: dict[str, int] = {}
    line: int | None = None
    for row in text.splitlines():
        if label := _LABEL.match(row):
            labels[label[1]] = len(found)
        elif source := _LINE.match(row):
            line = int(source[1])
        elif instruction := _INSTRUCTION.search(row):
            found.append((instruction, line))
    if not found:
        raise ValueError("no instruction in the disassembly")
    addresses = {int(match["address"], 16): index for index, (match, _) in enumerate(found)}
    return [
        Instruction(
            address=int(match["address"], 16),
            opcode=match["opcode"],
            operands=match["operands"],
            predicate=match["predicate"] or "",
            line=source_line,
            target=_target(match, labels, addresses),
        )
        for match, source_line in found
    ]


def _target(match: re.Match[str], labels: dict[str, int], addresses: dict[int, int]) -> int | None:
    if match["opcode"].split(".")[0] not in _BRANCHES:
        return None
    place = _TARGET.search(match["operands"])
    if place is None:
        raise ValueError(f"a branch without a target: {match[0]}")
    label = place["label"] or place["bare"]
    index = labels.get(label) if label else addresses.get(int(place["address"], 16))
    if index is None:
        raise ValueError(f"a branch to a place that is not there: {match[0]}")
    return index


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """All natural loops, by header.

    A branch backwards makes a loop only if its target dominates it: code that the assembler has
    moved behind the kernel's end and that jumps back into the middle of a loop makes none.
    """
    graph = nx.DiGraph()
    graph.add_node(0)
    for index, instruction in enumerate(code):
        if instruction.falls_through and index + 1 < len(code):
            graph.add_edge(index, index + 1)
        # A target behind the last instruction is a label at the end of the text.
        if instruction.target is not None and instruction.target < len(code):
            graph.add_edge(index, instruction.target)
    graph = graph.subgraph({0, *nx.descendants(graph, 0)})
    dominators = nx.immediate_dominators(graph, 0)
    bodies: dict[int, set[int]] = {}
    for index, header in sorted(graph.edges):
        if header <= index and _dominates(header, index, dominators):
            inside = graph.subgraph(graph.nodes - {header})
            body = {index, *nx.ancestors(inside, index)} if index != header else set()
            bodies.setdefault(header, {header}).update(body)
    return [Loop(header, frozenset(body)) for header, body in sorted(bodies.items())]


def _dominates(header: int, index: int | None, dominators: Mapping[int, int | None]) -> bool:
    """Whether every way to an instruction leads through the header."""
    while index is not None and index != header:
        above = dominators.get(index)
        index = None if above == index else above  # the first instruction is its own
    return index == header


def enclosing(loop: Loop, loops: Iterable[Loop]) -> list[Loop]:
    """Loops around ``loop``, innermost first."""
    around = [other for other in loops if other.body > loop.body]
    return sorted(around, key=lambda other: len(other.body))


def kind_of(opcode: str) -> str:
    """One of ``KINDS``. Moves, special registers and the uniform datapath count as integer."""
    base, *modifiers = opcode.split(".")
    # The way from half to single precision is an addition of -0.
    if base == "HADD2" and "F32" in modifiers:
        return "conversion"
    # ``U`` before an integer instruction is the uniform datapath's.
    for name in (base, base.removeprefix("U")):
        for kind, opcodes in _OPCODES.items():
            if re.fullmatch(opcodes, name):
                return kind
    return "other"


def count_kinds(code: Iterable[Instruction]) -> dict[str, int]:
    """Instructions of each of ``KINDS``; the kinds that do not occur are 0."""
    counts = Counter(kind_of(instruction.opcode) for instruction in code)
    return {kind: counts[kind] for kind in KINDS}


def load_bits(opcode: str) -> int | None:
    """Bits that a load moves for each thread; None for everything that is no load.

    Loads are those of global memory (``LDG``), of global into shared memory (``LDGSTS``) and of
    shared memory (``LDS``, ``LDSM``).
    """
    base, *modifiers = opcode.split(".")
    if base == "LDSM":
        # A count of matrices of 8 x 8 halves: 32 bits of each for a thread.
        return 32 * int(modifiers[-1]) if modifiers[-1].isdigit() else 32
    if base not in ("LDG", "LDGSTS", "LDS"):
        return None
    return next((_WIDTHS[name] for name in modifiers if name in _WIDTHS), 32)
