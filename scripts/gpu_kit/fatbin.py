"""Machine code of several GPUs in one library: keep that of some, so that the rest compresses.

A library of CUDA code holds fatbins: a header, then one entry per GPU, each with a header of its
own. The driver picks the entry of its GPU and never looks at the others, so their bytes may be 0.
Offsets and sizes stay as they are.
"""

import struct
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

MAGIC = struct.pack("<I", 0xBA55ED50)
#: Behind the magic number: version, bytes of the header, bytes of all entries.
_HEADER = struct.Struct("<HHQ")
#: Of an entry: kind, version, bytes of its header, bytes behind that.
_ENTRY = struct.Struct("<HHIQ")
#: Compute capability, from the start of an entry.
_CAPABILITY_AT = 28
PTX, MACHINE_CODE = 1, 2
#: No entry's header is longer: what claims to be one is no fatbin.
_LONGEST_HEADER = 256


@dataclass
class Stripped:
    """A library without the machine code of other GPUs."""

    data: bytes  # as long as before
    #: Bytes of entries that stay, by compute capability.
    kept: Counter[int] = field(default_factory=Counter)
    zeroed: Counter[int] = field(default_factory=Counter)  # bytes of the others


def strip(data: bytes, keep: Collection[int]) -> Stripped:
    """Zero all entries but machine code of the given compute capabilities.

    PTX goes, too: a GPU that has machine code needs none.

    Args:
        data: The library.
        keep: Compute capabilities, such as 90.
    """
    made = bytearray(data)
    result = Stripped(data)
    at = data.find(MAGIC)
    while at >= 0 and at + len(MAGIC) + _HEADER.size <= len(data):
        _, header, size = _HEADER.unpack_from(data, at + len(MAGIC))
        end = min(at + header + size, len(data))
        _strip_entries(made, at + header, end, keep, result)
        # Whatever only looks like a fatbin may claim to have no bytes at all.
        at = data.find(MAGIC, max(end, at + len(MAGIC)))
    result.data = bytes(made)
    return result


def _strip_entries(
    made: bytearray, at: int, end: int, keep: Collection[int], result: Stripped
) -> None:
    while at + _CAPABILITY_AT + 4 <= end:
        kind, _, header, size = _ENTRY.unpack_from(made, at)
        if kind not in (PTX, MACHINE_CODE) or not _ENTRY.size <= header <= _LONGEST_HEADER:
            return
        (capability,) = struct.unpack_from("<I", made, at + _CAPABILITY_AT)
        first, last = at + header, min(at + header + size, end)
        if kind == MACHINE_CODE and capability in keep:
            result.kept[capability] += last - first
        else:
            made[first:last] = bytes(last - first)
            result.zeroed[capability] += last - first
        at = last
