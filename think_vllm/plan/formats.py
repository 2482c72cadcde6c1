"""The formats of thin blocks: how keys and values are stored.

An **encoding** says how one matrix of numbers is stored, a **format** names an encoding for keys
and one for values. Both are independent of how many key channels are kept.
"""

from dataclasses import dataclass
from enum import Enum

#: Values of ``--kv-quant-group``: elements that share a scale and a zero point.
GROUP_SIZES = (32, 64, 128)
#: Largest finite value of float8 e4m3 (the variant without infinities).
FP8_MAX = 448.0


class Encoding(Enum):
    """How a matrix is stored; the value is the number of bits, 0 for the cache's own dtype."""

    PLAIN = 0
    #: float8 e4m3 with one float32 scale per matrix. An e4m3 number has its own exponent and
    #: keeps its precision down to 2 ** -15 of the largest one, so finer scales would cost bytes
    #: and buy nothing; the scale maps the matrix's largest magnitude to ``FP8_MAX``, so nothing
    #: overflows. That precision is relative, though: a key channel that is far from 0 all the
    #: time, as a bias makes it, would lose what its tokens differ in. So each key channel has a
    #: float16 zero point, and codes say how far a key is from that.
    FP8 = 8
    #: Asymmetric integers with a float16 scale and zero point per group (KIVI, arXiv 2402.02750).
    INT4 = 4
    INT2 = 2

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with scales and zero points per group."""
        return self in (Encoding.INT4, Encoding.INT2)

    def element_bits(self, itemsize: int) -> int:
        """Bits of one element in a cache whose own elements have ``itemsize`` bytes."""
        return self.value or 8 * itemsize


@dataclass(frozen=True)
class BlockFormat:
    """Encodings of a thin block."""

    name: str  # value of ``--kv-quant``
    keys: Encoding  # encoding of keys. Integers: per channel, over groups of tokens
    values: Encoding  # encoding of values. Integers: per token, over groups of channels

    @property
    def has_groups(self) -> bool:
        """Whether ``--kv-quant-group`` matters."""
        return self.keys.is_integer or self.values.is_integer


FORMATS = {
    format.name: format
    for format in (
        BlockFormat("none", Encoding.PLAIN, Encoding.PLAIN),
        BlockFormat("fp8", Encoding.FP8, Encoding.FP8),
        BlockFormat("kivi4", Encoding.INT4, Encoding.INT4),
        BlockFormat("k4v2", Encoding.INT4, Encoding.INT2),
        BlockFormat("kivi2", Encoding.INT2, Encoding.INT2),
    )
}
