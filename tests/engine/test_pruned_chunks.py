"""Prompts pruned chunk by chunk, and prefix caching with that."""

from tests.engine.conftest import Load
from tests.support.checks import BOTH, EAGER, TOLERANCE, hit_of, random_prompts
from tests.support.prefix_reference import PrefixReference, view_of, worst


def test_prompts_pruned_at_chunk_ends(load: Load, prefix_reference: PrefixReference) -> None:
    # 35 blocks of 48 tokens hold 1,680 dense ones; the null block is one more.
    chunk, pool = 256, 36 * 196_608
    arguments = ("--kv-prune-prefill", "--max-num-batched-tokens", str(chunk))
    engine = load(
        *EAGER, "--kv-channel-prune", "0.5", "--kv-value-prune", "0.3", *arguments,
        "--max-model-len", "2048", "--no-async-scheduling",
        kv_cache_bytes=pool,
    )  # fmt: skip
    for length in (200, 700, 1900):
        (prompt,) = random_prompts([length], seed=length)
        completion = engine.complete(prompt, 60)
        view = view_of(prompt, completion, BOTH)
        view.chunk_starts = range(0, length, chunk)
        assert worst(prefix_reference, prompt, completion, view) < TOLERANCE
    # Spans of the last one come thin from the cache, tables and all.
    (other,) = random_prompts([100], seed=1)
    hitting = prompt[:700] + other
    answer, hit = hit_of(engine, hitting, 40)
    assert hit == 2 * 240
    hit_view = view_of(
        hitting, answer, BOTH, cached=view, cached_spans=2, cached_tokens=hit,
        chunk_starts=range(hit, len(hitting), chunk),
    )  # fmt: skip
    assert worst(prefix_reference, hitting, answer, hit_view) < TOLERANCE
