"""The byte layout of KV blocks: the only place that states it.

Pure integers, no torch: planner, references, kernels, spec and tests all import this file.

vLLM's page of one layer is ``[kv_head, N, 2 * D]`` elements (layout ``LBHNC``), so one
(block, KV head) is one contiguous **run** of ``N * 2 * D * itemsize`` bytes. Both block
kinds live in such a run::

    dense block   keys   [D, N]   channel-major    at 0
                  values [N, D]   token-major      at D * N * itemsize

    thin block    keys   [C, t]   channel-major    at 0
                  values [t, D]   token-major      at values_offset (16-byte aligned)
                  table  [C]      uint8            at table_offset
                  (unused up to the end of the run)

``D`` is the head size, ``N`` the block size in tokens, ``C < D`` the kept key channels and
``t > N`` the tokens of a thin block. ``table[i]`` is the channel that key row ``i`` holds,
ascending: a thin block describes itself, per KV head.

The dense form is the one that vLLM's CPU kernels (``vec``/``vec16``) store and read, so
they serve dense blocks as they are. Worked example, bf16, D = 128, N = 48, C = 63, t = 64:
run 24,576 B; keys 0..8,063; values 8,064..24,447; table 24,448..24,510; 65 B unused.
"""

from dataclasses import dataclass

from think_vllm.errors import ThinkError

#: Values start on a multiple of this, so that vector loads never straddle an element.
ALIGN_BYTES = 16
#: A channel number is one byte in the table.
MAX_HEAD_SIZE = 256


def align_up(num_bytes: int, alignment: int = ALIGN_BYTES) -> int:
    """Round ``num_bytes`` up to a multiple of ``alignment``."""
    return -(-num_bytes // alignment) * alignment


@dataclass(frozen=True)
class DenseLayout:
    """Byte offsets inside the run of a dense block.

    Args:
        head_size: Channels of a key and of a value.
        block_size: Tokens of a block.
        itemsize: Bytes of an element.
    """

    head_size: int
    block_size: int
    itemsize: int

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * 2 * self.head_size * self.itemsize

    @property
    def values_offset(self) -> int:
        """Byte at which the values start."""
        return self.head_size * self.block_size * self.itemsize


@dataclass(frozen=True)
class ThinLayout:
    """Byte offsets inside the run of a thin block.

    Args:
        head_size: Channels of a value, and of a key before pruning.
        key_channels: Kept key channels.
        block_tokens: Tokens that the thin block holds.
        block_size: Tokens that the same bytes hold densely.
        itemsize: Bytes of an element.

    Raises:
        ThinkError: If the contents do not fit the run.
    """

    head_size: int
    key_channels: int
    block_tokens: int
    block_size: int
    itemsize: int

    def __post_init__(self) -> None:
        if not 0 < self.key_channels <= self.head_size <= MAX_HEAD_SIZE:
            raise ThinkError(
                f"ThinLayout: key_channels={self.key_channels}, head_size={self.head_size}; "
                f"need 0 < key_channels <= head_size <= {MAX_HEAD_SIZE}"
            )
        if self.used_bytes > self.run_bytes:
            raise ThinkError(
                f"ThinLayout: {self.block_tokens} tokens with {self.key_channels} of "
                f"{self.head_size} key channels take {self.used_bytes} bytes, a block has "
                f"{self.run_bytes}; keep fewer channels or fewer tokens"
            )

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * 2 * self.head_size * self.itemsize

    @property
    def values_offset(self) -> int:
        """Byte at which the values start."""
        return align_up(self.key_channels * self.block_tokens * self.itemsize)

    @property
    def table_offset(self) -> int:
        """Byte at which the channel table starts."""
        return self.values_offset + self.block_tokens * self.head_size * self.itemsize

    @property
    def used_bytes(self) -> int:
        """Bytes of the run that carry keys, values, padding between them, and the table."""
        return self.table_offset + self.key_channels


def max_key_channels(head_size: int, block_tokens: int, block_size: int, itemsize: int) -> int:
    """Largest number of key channels with which ``block_tokens`` tokens fit a block.

    Returns:
        Channels, 0 if not even one fits.
    """
    run_bytes = block_size * 2 * head_size * itemsize
    free = run_bytes - block_tokens * head_size * itemsize
    channels = min(head_size, max(0, free // (block_tokens * itemsize + 1)))
    while channels and align_up(channels * block_tokens * itemsize) + channels > free:
        channels -= 1
    return channels
