"""Private names of vLLM's KV cache: its registry of specs, its pool, the size of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import CacheConfig


def fix_block_size(cache_config: CacheConfig, block_size: int) -> None:
    """Set the block size for good, as if the user had named it."""
    cache_config.block_size = block_size
    cache_config.user_specified_block_size = True


def register_spec(spec: type, manager: type, base: type) -> None:
    """Register a KV cache spec with its block manager, after vLLM's own."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager_class=manager, uniform_type_base_spec=base)


def block_key(block_hash: Any, group: int) -> Any:
    """Key of a cached block: the hash of the tokens up to its end, and a group or name space."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    return make_block_hash_with_group_id(block_hash, group)


def cache_block(pool: Any, key: Any, block: Any, num_tokens: int) -> None:
    """Let a block of vLLM's pool be found under a key, which must be its only one."""
    pool._insert_block_hash(key, block, num_tokens=num_tokens)
