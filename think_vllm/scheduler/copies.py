"""Copies of dense blocks that stay in the prefix cache when compaction overwrites the blocks."""

from collections.abc import Sequence
from typing import Any

from think_vllm.hooks.kv_cache import cache_block

#: Copies are made while at least this share of the pool is free: caching must not make running
#: requests wait.
FREE_SHARE = 1 / 8


class CacheCopies:
    """Blocks that hold copies, known to the cache from the step after the one that copies them.

    A hit in the same step could be copied itself, before this copy has run.

    Args:
        pool: vLLM's block pool.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._fresh: list[tuple[Any, int, Any]] = []

    def move(self, blocks: Sequence[Any], pending: list[tuple[Any, Any]]) -> bool:
        """Have blocks copied, and take the blocks themselves out of the cache.

        Args:
            blocks: What the step that is being scheduled overwrites.
            pending: Copies (source, destination) that vLLM runs before that step, and whose
                blocks it releases afterwards, once each. Extended.

        Returns:
            Whether there was room; else nothing has happened.
        """
        pool = self._pool
        if pool.get_num_free_blocks() - len(blocks) < FREE_SHARE * pool.num_gpu_blocks:
            return False
        for block in blocks:
            key, num_tokens = block.block_hash, block.block_hash_num_tokens
            if key is None:
                continue  # a copy of another request's block, which is cached itself
            (copy,) = pool.get_new_blocks(1)
            pool.evict_blocks({block.block_id})
            block.ref_cnt += 1  # until the copy has run; that of the copy, too
            copy.ref_cnt += 1  # until it is published
            pending.append((block, copy))
            self._fresh.append((key, num_tokens, copy))
        return True

    def publish(self) -> None:
        """Let the cache have the copies that earlier steps have made."""
        for key, num_tokens, copy in self._fresh:
            cache_block(self._pool, key, copy, num_tokens)
        # Backwards, as vLLM frees a request's blocks: the end of a prefix is evicted first.
        self._pool.free_blocks([copy for _, _, copy in reversed(self._fresh)])
        self._fresh.clear()
