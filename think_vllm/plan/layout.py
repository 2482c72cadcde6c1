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

Keys and values of a thin block are each a matrix, plain or quantized, whose bytes
``matrix_layout.py`` states.

Every part but the tables starts on a multiple of 16 bytes. The last thin block of a span may
hold fewer tokens than ``t``; rows keep their length, what lies behind its tokens is undefined.
Kernels read rows in vectors of 16 columns, and what they read behind the last row of pruned
values lies within the run too.

Worked examples, bf16, D = 128. Pruned by half, N = 48, C = 63, t = 64: run 24,576 B; keys
0..8,063; values 8,064..24,447; table 24,448..24,510; 65 B unused. The same with 4-bit keys
and 2-bit values in groups of 32, N = 16, C = 64, t = 88: run 8,192 B; key codes 0..2,815,
scales to 3,199, zeros to 3,583; value codes to 6,399, scales to 7,103, zeros to 7,807; table
7,808..7,871; 320 B unused. In fp8, N = 48, C = 62, t = 128: run 24,576 B; key codes 0..7,935,
scale to 7,939, zeros 7,952..8,075; value codes 8,080..24,463, scale to 24,467; table
24,468..24,529; 46 B unused. Both kinds of channels pruned by half, plain, N = 32, C = 63, V = 64,
t = 64: run 16,384 B; keys 0..8,063; values 8,064..16,255; key table 16,256..16,318; value table
16,319..16,382; 1 B unused.
"""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from think_vllm.errors import ThinkError
from think_vllm.plan.formats import FORMATS, BlockFormat, Encoding
from think_vllm.plan.matrix_layout import MatrixLayout, align_up

#: A channel number is one byte in a table.
MAX_HEAD_SIZE = 256
#: Columns that kernels read at a time.
VECTOR_COLUMNS = 16


class BlockForm(Enum):
    """For what blocks are laid out, which depends on whose kernels read them."""

    #: Dense keys ``[D, N]``, then values ``[N, D]``; codes in rows.
    CPU = "cpu"
    #: Dense rows ``[N, 2, D]`` of a key and a value; codes in units.
    GPU = "gpu"


@dataclass(frozen=True)
class DenseLayout:
    """Where a dense block has its keys and values."""

    head_size: int  # channels of a key and of a value
    block_size: int  # tokens of a block
    itemsize: int  # bytes of an element
    form: BlockForm = BlockForm.CPU  # which of the two forms it has

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
class ThinLayout:
    """Byte offsets inside the run of a thin block.

    Raises:
        ThinkError: If the contents do not fit the run.
    """

    head_size: int  # channels of a key and of a value before pruning
    key_channels: int  # kept key channels
    block_tokens: int  # tokens that the thin block holds
    block_size: int  # tokens that the same bytes hold densely
    itemsize: int  # bytes of an element of the cache
    format: BlockFormat = FORMATS["none"]  # how keys and values are stored
    group: int = 32  # elements that share a scale, for integer encodings
    value_channels: int | None = None  # kept value channels; None for all

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
            has_zero_points=self.format.keys is Encoding.FP8,
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
        bits = self.values.encoding.element_bits(self.itemsize)
        read = align_up(self.value_columns, VECTOR_COLUMNS) * bits // 8
        last_row = self.values.offset + (self.block_tokens - 1) * self.values.row_bytes
        return max(self.value_table_offset + self.value_columns, last_row + read)


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
