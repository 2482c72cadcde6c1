"""Scratch blocks in which fresh prompts attend at vLLM's full speed.

The cache's own dense blocks have a form that thin blocks can be made from, and a size that
makes spans come out even. vLLM's fastest kernel on a machine may want another form (AMX) or
multiples of 32 tokens. A prompt whose first token is in the step needs nothing from the cache,
so its keys and values are stored a second time, here, in the form that this kernel wants. That
costs one copy of the step's keys and values, and saves more than a tenth of its attention.
"""

from __future__ import annotations

import numpy as np
import torch
from vllm import _custom_ops as ops

from think_vllm.worker.step import Int64Array

#: vLLM's own default on CPUs; a multiple of what every kernel family wants.
BLOCK_SIZE = 128


class PromptScratch:
    """Blocks for one step's fresh prompts, shared by the layers of a group.

    Layers run one after the other, so each overwrites what the one before has stored.

    Args:
        num_kv_heads: ``Hk``.
        head_size: ``D``.
        dtype: Of keys and values.
        isa: vLLM's kernel family that stores and reads the blocks.
    """

    def __init__(self, num_kv_heads: int, head_size: int, dtype: torch.dtype, isa: str) -> None:
        self.isa = isa
        # Kept between steps: fresh pages cost as much as the copy itself.
        self._blocks = torch.empty(0, num_kv_heads, BLOCK_SIZE, 2 * head_size, dtype=dtype)
        self._slots = torch.empty(0, dtype=torch.int64)
        self._last = torch.empty(0, dtype=torch.int64)

    @property
    def blocks(self) -> torch.Tensor:
        """The blocks, in place of a cache: ``[num_blocks, Hk, N, 2 * D]``."""
        return self._blocks

    def place(self, num_tokens: Int64Array) -> torch.Tensor:
        """Give each prompt of a step blocks of its own.

        Args:
            num_tokens: int64 [n]. Tokens of each prompt.

        Returns:
            int32 [n, width]. Block table.
        """
        counts = -(-num_tokens // BLOCK_SIZE)
        first = np.cumsum(counts) - counts
        total = int(counts.sum())
        self._last = torch.from_numpy(first + counts - 1)
        if total > self._blocks.shape[0]:
            self._blocks = self._blocks.new_empty(total, *self._blocks.shape[1:])
        self._slots = torch.from_numpy(
            np.concatenate(
                [
                    block * BLOCK_SIZE + np.arange(count)
                    for block, count in zip(first, num_tokens, strict=True)
                ]
            )
        )
        table = first[:, None] + np.arange(int(counts.max()))[None, :]
        return torch.from_numpy(np.minimum(table, total - 1).astype(np.int32))

    def store(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store the placed prompts' keys and values, ``[num_tokens, Hk, D]``, in their order."""
        # The kernel reads whole blocks and gives what lies beyond a prompt the weight zero,
        # which leaves a NaN a NaN: unused memory, or another prompt's.
        self._blocks[self._last] = 0
        num_blocks, num_kv_heads, block_size, width = self._blocks.shape
        halves = self._blocks.view(num_blocks, num_kv_heads, 2 * block_size, width // 2)
        key_cache, value_cache = halves.chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(
            key,
            value,
            key_cache,
            value_cache,
            self._slots,
            self.isa,
            k_scale=1.0,
            v_scale=1.0,
            kv_cache_dtype="auto",
        )
