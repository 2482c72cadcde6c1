"""The byte layout of a static block: kept channels alone, from its first token on.

The channels are the same for every token (``--kv-select static``), in caches that hold nothing
else::

    static block  values [N, V]   token-major      at 0
                  keys   [C, N]   channel-major    behind the values
                  scales [N]      float32, of keys behind the keys; fp8 alone
                  scales [N]      float32, of values behind that; fp8 alone

It needs no table, since its layer has one, and is never anything else, so its run is as short as
its contents: ``N * (C + V)`` elements, or as many e4m3 codes and 8 bytes of scales a token. A token
is written by itself, so in fp8 its keys have a scale of their own, and its values. Values come
first: kernels read rows in vectors of 16 columns, and what they read behind the last row of ``V``
values is keys, within the run.

Worked example, bf16, D = 128. A static block with half of the keys, N = 128, C = 64, V = 128: run
49,152 B; values 0..32,767; keys 32,768..49,151. The same in fp8: run 25,600 B; values 0..16,383;
keys 16,384..24,575; scales of keys 24,576..25,087, of values 25,088..25,599.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StaticLayout:
    """Byte offsets inside the run of a static block."""

    key_channels: int  # kept key channels
    value_channels: int  # kept value channels
    block_size: int  # tokens of a block
    itemsize: int  # bytes of an element of the model's dtype
    #: Whether keys and values are e4m3 codes, with a scale each for every token.
    is_quantized: bool = False

    @property
    def stored_itemsize(self) -> int:
        """Bytes of a key or value of one channel."""
        return 1 if self.is_quantized else self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one KV head."""
        channels = self.key_channels + self.value_channels
        return channels * self.stored_itemsize + (8 if self.is_quantized else 0)

    @property
    def keys_offset(self) -> int:
        """Byte at which the keys start."""
        return self.block_size * self.value_channels * self.stored_itemsize

    @property
    def key_scales_offset(self) -> int:
        """Byte at which the keys' scales start, if they are quantized: behind the keys."""
        return self.keys_offset + self.block_size * self.key_channels * self.stored_itemsize

    @property
    def value_scales_offset(self) -> int:
        """Byte at which the values' scales start, if they are quantized."""
        return self.key_scales_offset + 4 * self.block_size

    @property
    def run_bytes(self) -> int:
        """Bytes of one (block, KV head)."""
        return self.block_size * self.token_bytes
