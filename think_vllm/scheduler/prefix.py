"""Thin blocks in vLLM's prefix cache: under which keys they are found.

vLLM finds a full dense block by the hash of the tokens up to its end. The thin blocks of a span
are found by the hash of the tokens up to the span's end, the ``j``-th of them in a name space of
its own, so dense and thin forms of the same tokens never meet. A third name space has dense
blocks that were computed over thin ones: their keys and values are approximate, and must not
continue an exact prefix.

A span's thin blocks share one choice of channels. Two requests select differently, so blocks of
two versions must never be mixed: at most one version of a span is in the cache.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize, resolve_block_hashes

from think_vllm.hooks.kv_cache import block_key, cache_block
from think_vllm.plan.spans import SpanRule

#: Name spaces are numbered from here on in the group id of vLLM's keys, whose 32 bits have room.
_APPROXIMATE = 1 << 16
_THIN = 2 << 16


class LimitedHashes(list[Any]):
    """Block hashes of a request that may not hit all there is: one that resumes, or stays dense.

    vLLM looks prefixes up by hashes alone, which do not say whose they are.

    Args:
        hashes: The hashes so far; vLLM adds to them.
        max_tokens: Longest prefix that is of use.
        max_thin_spans: How many thin spans are.
    """

    def __init__(self, hashes: Iterable[Any], max_tokens: int, max_thin_spans: int) -> None:
        super().__init__(hashes)
        self.max_tokens = max_tokens
        self.max_thin_spans = max_thin_spans


def limits_of(hashes: Any) -> LimitedHashes | None:
    """What limits a lookup by these hashes.

    With ``--prefix-match-unit`` vLLM hashes smaller pieces than blocks, and looks at them through a
    view of every so many. The limits are tokens and spans, the same in both.
    """
    if isinstance(hashes, BlockHashListWithBlockSize):
        hashes = hashes.block_hashes
    return hashes if isinstance(hashes, LimitedHashes) else None


def block_hashes_of(hashes: Any, pool: Any, rule: SpanRule) -> Sequence[Any]:
    """The hashes of whole blocks, whatever vLLM has hashed."""
    found: Sequence[Any] = resolve_block_hashes(hashes, pool.hash_block_size, rule.block_size)
    return found


def approximate_group(group: int) -> int:
    """Name space of dense blocks that were computed over thin ones."""
    return group + _APPROXIMATE


def thin_groups(group: int, rule: SpanRule) -> list[int]:
    """Name spaces of the first, second, ... thin block of a span."""
    return [group + _THIN + (j << 16) for j in range(rule.thin_blocks)]


def find_thin_prefix(
    pool: Any, block_hashes: Any, max_tokens: int, group: int, rule: SpanRule
) -> list[Any]:
    """Find the longest cached prefix of thin spans, and dense blocks behind; empty if none.

    Args:
        pool: vLLM's block pool.
        block_hashes: Of a prompt, as vLLM looks them up.
        max_tokens: Longest prefix that is of use.
        group: KV cache group.
        rule: What a span is.
    """
    limits = limits_of(block_hashes)
    most = max_tokens
    if limits is not None:
        most = min(most, limits.max_thin_spans * rule.span_tokens)
    hashes = block_hashes_of(block_hashes, pool, rule)
    rows = find_thin(pool, hashes, most, group, rule)
    if not rows:
        return []
    last = max_tokens // rule.block_size
    if rule.prune_prefill:
        # The worker takes every older span for thin.
        last = min(last, len(rows) + rule.span_blocks - 1)
    return rows + find_dense_behind(pool, hashes, len(rows), last, group)


def find_thin(
    pool: Any, hashes: Sequence[Any], max_tokens: int, group: int, rule: SpanRule
) -> list[Any]:
    """Find the longest cached prefix of thin spans.

    Args:
        pool: vLLM's block pool.
        hashes: Of a prompt's full blocks.
        max_tokens: Longest prefix that is of use.
        group: KV cache group.
        rule: What a span is.

    Returns:
        Rows of a block table: per span its thin blocks, then null blocks.
    """
    rows: list[Any] = []
    groups = thin_groups(group, rule)
    tail = [pool.null_block] * (rule.span_blocks - rule.thin_blocks)
    for _ in range(min(max_tokens // rule.span_tokens, len(hashes) // rule.span_blocks)):
        found = pool.get_cached_block(hashes[len(rows) + rule.span_blocks - 1], groups)
        if found is None:
            break
        rows += [*found, *tail]
    return rows


def find_dense_behind(
    pool: Any, hashes: Sequence[Any], start: int, end: int, group: int
) -> list[Any]:
    """Find cached dense blocks ``start .. end - 1`` of a prompt, exact or approximate ones."""
    rows: list[Any] = []
    for block_hash in hashes[start:end]:
        found = pool.get_cached_block(block_hash, [group]) or pool.get_cached_block(
            block_hash, [approximate_group(group)]
        )
        if found is None:
            break
        rows += found
    return rows


def cache_thin(
    pool: Any, block_hash: Any, blocks: Sequence[Any], num_tokens: int, group: int, rule: SpanRule
) -> None:
    """Put a span's thin blocks into the cache, unless a version of it is there.

    Args:
        pool: vLLM's block pool.
        block_hash: Of the tokens up to the span's end.
        blocks: Its thin blocks.
        num_tokens: Tokens up to the span's end.
        group: KV cache group.
        rule: What a span is.
    """
    groups = thin_groups(group, rule)
    if pool.get_cached_block(block_hash, groups) is not None:
        return
    # What eviction left of another version must not be found together with this one.
    for space in groups:
        left = pool.get_cached_block(block_hash, [space])
        if left is not None:
            pool.evict_blocks({left[0].block_id})
    pool.evict_blocks({block.block_id for block in blocks})
    for space, block in zip(groups, blocks, strict=True):
        cache_block(pool, block_key(block_hash, space), block, num_tokens)
