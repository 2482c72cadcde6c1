"""The byte layout of KV blocks: the only place that states it.

Pure integers, no torch: planner, references, kernels, spec and tests all import this file.

vLLM's page of one layer is ``[kv_head, N, 2 * D]`` elements (layout ``LBHNC``), so one
(block, KV head) is one contiguous **run** of ``N * 2 * D * itemsize`` bytes. Both block
kinds live in such a run::

    dense block   keys   [D, N]   channel-major    at 0                          on CPUs
                  values [N, D]   token-major      at D * N * itemsize

    dense block   rows   [N, 2, D]                 at 0                          on GPUs
                  row n is the key, then the value of token n

    thin block    keys   [C, t]   channel-major    at 0
                  values [t, V]   token-major      behind the keys
                  table  [C]      uint8            behind the values; absent if C = D
                  table  [V]      uint8            behind that; absent if V = D
                  (unused up to the end of the run)

``D`` is the head size, ``N`` the block size in tokens, ``C <= D`` the kept key channels,
``V <= D`` the kept value channels and ``t > N`` the tokens of a thin block. The tables say which
channel a row of keys, or a column of values, holds, ascending: a thin block describes itself, per
KV head.

A dense block has the form that vLLM's own kernels store and read, so that these serve it as it is:
the CPU kernels (``vec``/``vec16``) want keys channel-major, FlashAttention wants tokens in rows and
takes ``[num_blocks, N, Hk, D]`` views of keys and of values.

Keys and values of a thin block are each a coded matrix ``[R, X]``, rows contiguous::

    plain    elements [R, X]              of the cache's dtype
    fp8      codes    [R, X]              float8 e4m3 (no infinities)
             scale    float32             one: element = zero[r] + code * scale
             zeros    float16 [R]         keys alone; for values, zero = 0
    int4,    codes    [R, X * bits / 8]   element x at bits bits * x.. of its row, little-endian
    int2     scales   float16 [G, R]      element = zero[x // g, r] + code * scale[x // g, r]
             zeros    float16 [G, R]      G = ceil(X / g) groups of g elements of a row

Codes lie in their ``R * ceil(X * bits / 8)`` bytes in one of two orders, for what reads them. On
CPUs rows are contiguous, as above. On NVIDIA GPUs two rows are interleaved, in **units** of 8
bytes, so that a thread finds in its registers what tensor cores take (``csrc_triton/units.py``)::

    unit  [X / (32 / bits), R / 2]        rows 2 r and 2 r + 1, 32 / bits columns of each:
          2 bytes of the one, 2 of the other, the next 2 of the one, the next 2 of the other

    factors  float16 [G, R / 2, 2, 2]     scales of the two rows, then their zeros

There ``X`` is rounded up to whole units, and ``R`` is even: the kept channels of coded keys are.

Every part but the tables starts on a multiple of 16 bytes. The last thin block of a span may
hold fewer tokens than ``t``; rows keep their length, what lies behind its tokens is undefined.
Kernels read rows in vectors of 16 columns, and what they read behind the last row of pruned
values lies within the run too.

With channels that are the same for every token (``--kv-select static``) there is a third kind, in
caches that hold nothing else::

    static block  values [N, V]   token-major      at 0
                  keys   [C, N]   channel-major    behind the values
                  scales [N]      float32, of keys behind the keys; fp8 alone
                  scales [N]      float32, of values behind that; fp8 alone

It needs no table, since its layer has one, and is never anything else, so its run is as short as
its contents: ``N * (C + V)`` elements, or as many e4m3 codes and 8 bytes of scales a token. A token
is written by itself, so in fp8 its keys have a scale of their own, and its values. Values come
first: kernels read rows in vectors of 16 columns, and what they read behind the last row of ``V``
values is keys, within the run.

Worked examples, bf16, D = 128. Pruned by half, N = 48, C = 63, t = 64: run 24,576 B; keys
0..8,063; values 8,064..24,447; table 24,448..24,510; 65 B unused. The same with 4-bit keys
and 2-bit values in groups of 32, N = 16, C = 64, t = 88: run 8,192 B; key codes 0..2,815,
scales to 3,199, zeros to 3,583; value codes to 6,399, scales to 7,103, zeros to 7,807; table
7,808..7,871; 320 B unused. In fp8, N = 48, C = 62, t = 128: run 24,576 B; key codes 0..7,935,
scale to 7,939, zeros 7,952..8,075; value codes 8,080..24,463, scale to 24,467; table
24,468..24,529; 46 B unused. Both kinds of channels pruned by half, plain, N = 32, C = 63, V = 64,
t = 64: run 16,384 B; keys 0..8,063; values 8,064..16,255; key table 16,256..16,318; value table
16,319..16,382; 1 B unused. A static block with half of the keys, N = 128, C = 64, V = 128: run
49,152 B; values 0..32,767; keys 32,768..49,151. The same in fp8: run 25,600 B; values 0..16,383;
keys 16,384..24,575; scales of keys 24,576..25,087, of values 25,088..25,599.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS, BlockFormat, Coding

#: Parts start on a multiple of this, so that vector loads never straddle an element.
ALIGN_BYTES = 16
#: A channel number is one byte in a table.
MAX_HEAD_SIZE = 256
#: A unit of codes: two rows, and as many columns as that leaves.
UNIT_BYTES = 8
#: Columns that kernels read at a time.
VECTOR_COLUMNS = 16


class BlockForm(Enum):
    """For what blocks are laid out, which depends on whose kernels read them."""

    #: Dense keys ``[D, N]``, then values ``[N, D]``; codes in rows.
    CPU = "cpu"
    #: Dense rows ``[N, 2, D]`` of a key and a value; codes in units.
    GPU = "gpu"


def align_up(num_bytes: int, alignment: int = ALIGN_BYTES) -> int:
    """Round ``num_bytes`` up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class DenseLayout:
    """Where a dense block has its keys and values.

    Args:
        head_size: Channels of a key and of a value.
        block_size: Tokens of a block.
        itemsize: Bytes of an element.
        form: Which of the two forms it has.
    """

    head_size: int
    block_size: int
    itemsize: int
    form: BlockForm = BlockForm.CPU

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * 2 * self.head_size * self.itemsize

    @property
    def values_offset(self) -> int:
        """Byte at which the first token's value starts; its key starts at 0."""
        tokens = 1 if self.form is BlockForm.GPU else self.block_size
        return self.head_size * tokens * self.itemsize

    @property
    def key_strides(self) -> tuple[int, int]:
        """Elements from one token's key to the next one's, and from channel to channel."""
        if self.form is BlockForm.GPU:
            return 2 * self.head_size, 1
        return 1, self.block_size

    @property
    def value_strides(self) -> tuple[int, int]:
        """The same of values."""
        if self.form is BlockForm.GPU:
            return 2 * self.head_size, 1
        return self.head_size, 1


@dataclass(frozen=True)
class MatrixLayout:
    """Byte offsets of a coded matrix inside a run.

    Args:
        coding: How its elements are stored.
        rows: ``R``.
        columns: ``X``.
        group: Elements of a row that share a scale, for integer codings.
        itemsize: Bytes of an element of the cache.
        offset: Byte at which its codes start, a multiple of 16.
        has_zeros: For fp8, whether every row has a zero.
    """

    coding: Coding
    rows: int
    columns: int
    group: int
    itemsize: int
    offset: int
    has_zeros: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of codes."""
        return -(-self.columns * self.coding.element_bits(self.itemsize) // 8)

    @property
    def unit_columns(self) -> int:
        """Columns of a unit, for codings."""
        return 32 // self.coding.value

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes, in either order."""
        rows = self.rows * self.row_bytes
        if self.coding is Coding.PLAIN:
            return rows
        return max(rows, -(-self.columns // self.unit_columns) * -(-self.rows // 2) * UNIT_BYTES)

    @property
    def groups(self) -> int:
        """``G``: groups of a row; 0 if the coding has none."""
        return -(-self.columns // self.group) if self.coding.is_integer else 0

    @property
    def content_bytes(self) -> int:
        """Bytes of codes, scales and zeros, without the padding between them."""
        factors = 4 * self.groups * self.rows
        if self.coding is Coding.FP8:
            factors = 4 + (2 * self.rows if self.has_zeros else 0)
        return self.rows * self.row_bytes + factors

    @property
    def scales_offset(self) -> int:
        """Byte at which the scales start: behind the codes."""
        return align_up(self.offset + self.code_bytes)

    @property
    def zeros_offset(self) -> int:
        """Byte at which the zeros start, if there are any: behind the scales."""
        scales = 4 if self.coding is Coding.FP8 else 2 * self.groups * self.rows
        return align_up(self.scales_offset + scales)

    @property
    def end(self) -> int:
        """First byte behind the matrix."""
        if self.coding is Coding.PLAIN:
            return self.offset + self.rows * self.row_bytes
        if self.coding is Coding.FP8:
            return self.zeros_offset + 2 * self.rows if self.has_zeros else self.scales_offset + 4
        return self.zeros_offset + 2 * self.groups * self.rows


@dataclass(frozen=True)
class ThinLayout:
    """Byte offsets inside the run of a thin block.

    Args:
        head_size: Channels of a key and of a value before pruning.
        key_channels: Kept key channels.
        block_tokens: Tokens that the thin block holds.
        block_size: Tokens that the same bytes hold densely.
        itemsize: Bytes of an element of the cache.
        format: How keys and values are coded.
        group: Elements that share a scale, for integer codings.
        value_channels: Kept value channels; None for all.

    Raises:
        ThinkError: If the contents do not fit the run.
    """

    head_size: int
    key_channels: int
    block_tokens: int
    block_size: int
    itemsize: int
    format: BlockFormat = FORMATS["none"]
    group: int = 32
    value_channels: int | None = None

    def __post_init__(self) -> None:
        for name in ("key_channels", "value_columns"):
            if not 0 < getattr(self, name) <= self.head_size <= MAX_HEAD_SIZE:
                raise ThinkError(
                    f"ThinLayout: {name}={getattr(self, name)}, head_size={self.head_size}; "
                    f"need 0 < {name} <= head_size <= {MAX_HEAD_SIZE}"
                )
        if self.used_bytes > self.run_bytes:
            values = f" and {self.value_channels} value channels" if self.has_value_table else ""
            raise ThinkError(
                f"ThinLayout: {self.block_tokens} tokens with {self.key_channels} of "
                f"{self.head_size} key channels{values} ({self.format.name}) take "
                f"{self.used_bytes} bytes, a block has {self.run_bytes}; keep fewer channels or "
                "fewer tokens"
            )

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * 2 * self.head_size * self.itemsize

    @cached_property
    def keys(self) -> MatrixLayout:
        """Keys ``[C, t]``."""
        return MatrixLayout(
            self.format.keys, self.key_channels, self.block_tokens, self.group, self.itemsize, 0,
            has_zeros=self.format.keys is Coding.FP8,
        )  # fmt: skip

    @property
    def value_columns(self) -> int:
        """``V``: kept value channels."""
        return self.head_size if self.value_channels is None else self.value_channels

    @cached_property
    def values(self) -> MatrixLayout:
        """Values ``[t, V]``."""
        return MatrixLayout(
            self.format.values,
            self.block_tokens,
            self.value_columns,
            self.group,
            self.itemsize,
            align_up(self.keys.end),
        )

    @property
    def has_table(self) -> bool:
        """Whether key channels were pruned, so that a table says which are kept."""
        return self.key_channels < self.head_size

    @property
    def has_value_table(self) -> bool:
        """Whether value channels were pruned, so that a table says which are kept."""
        return self.value_columns < self.head_size

    @property
    def table_offset(self) -> int:
        """Byte at which the table of key channels starts."""
        return self.values.end

    @property
    def value_table_offset(self) -> int:
        """Byte at which the table of value channels starts: behind that of key channels."""
        return self.table_offset + (self.key_channels if self.has_table else 0)

    @property
    def used_bytes(self) -> int:
        """Bytes of the run up to the end of its contents, padding between parts included."""
        if not self.has_value_table:
            return self.value_table_offset
        bits = self.values.coding.element_bits(self.itemsize)
        read = align_up(self.value_columns, VECTOR_COLUMNS) * bits // 8
        last_row = self.values.offset + (self.block_tokens - 1) * self.values.row_bytes
        return max(self.value_table_offset + self.value_columns, last_row + read)


@dataclass(frozen=True)
class StaticLayout:
    """Byte offsets inside the run of a static block.

    Args:
        key_channels: Kept key channels.
        value_channels: Kept value channels.
        block_size: Tokens of a block.
        itemsize: Bytes of an element of the model's dtype.
        is_coded: Whether keys and values are e4m3 codes, with a scale each for every token.
    """

    key_channels: int
    value_channels: int
    block_size: int
    itemsize: int
    is_coded: bool = False

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a key or value of one channel."""
        return 1 if self.is_coded else self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one KV head."""
        channels = self.key_channels + self.value_channels
        return channels * self.stored_itemsize + (8 if self.is_coded else 0)

    @property
    def keys_offset(self) -> int:
        """Byte at which the keys start."""
        return self.block_size * self.value_channels * self.stored_itemsize

    @property
    def key_scales_offset(self) -> int:
        """Byte at which the keys' scales start, if they are coded: behind the keys."""
        return self.keys_offset + self.block_size * self.key_channels * self.stored_itemsize

    @property
    def value_scales_offset(self) -> int:
        """Byte at which the values' scales start, if they are coded."""
        return self.key_scales_offset + 4 * self.block_size

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * self.token_bytes


def max_key_channels(
    head_size: int,
    block_tokens: int,
    block_size: int,
    itemsize: int,
    format: BlockFormat = FORMATS["none"],
    group: int = 32,
    value_channels: int | None = None,
) -> int:
    """Largest number of key channels with which ``block_tokens`` tokens fit a block.

    Returns:
        Channels, 0 if not even one fits.
    """

    def fits(channels: int) -> bool:
        try:
            ThinLayout(
                head_size, channels, block_tokens, block_size, itemsize, format, group,
                value_channels,
            )  # fmt: skip
        except ThinkError:
            return False
        return True

    if fits(head_size):  # without a table, hence with less than one channel fewer might take
        return head_size
    low, high = 0, head_size
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
