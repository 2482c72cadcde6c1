"""Prefix caching with exact copies, and prompts pruned chunk by chunk; over HTTP: tests/e2e."""

from dataclasses import replace

from tests.engine.conftest import Load
from tests.support.checks import BOTH, EAGER, TOLERANCE, assert_equal, hit_of, random_prompts
from tests.support.prefix_reference import PrefixReference, view_of, worst
from tests.support.reference import Reference


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


def test_dense_prefixes_are_exact(load: Load, recall_reference: Reference):
    # Spans choose their channels a step before they are compacted, each its own.
    flags = ("--kv-channel-prune", "0.5", "--max-num-batched-tokens", "2048")
    dense = ("--kv-prefix-cache", "dense", "--kv-channel-tables", "span")
    engine = load(*EAGER, *flags, "--kv-value-prune", "0.3", *dense)
    thinning = replace(BOTH, tables="span")
    donor, other = random_prompts([1000, 150], seed=21)
    left, hit = hit_of(engine, donor, 500)  # two more spans fill up and are compacted
    assert hit == 0
    prompt = donor[:900] + other
    answer, hit = hit_of(engine, prompt, 300)
    assert hit == 18 * 48
    # What was decoded over thin spans is not exact, and not in the cache.
    conversation = donor + left.tokens + other
    again, hit = hit_of(engine, conversation, 100)
    assert hit == 1000 // 48 * 48
    for tokens, completion in ((donor, left), (prompt, answer), (conversation, again)):
        assert_equal(recall_reference, [tokens], [completion], thinning)
    engine.wait_for_metric("vllm:kv_cache_usage_perc", 0)


def test_length_that_vllm_chooses_for_a_small_pool(load: Load, prefix_reference: PrefixReference):
    # 23 blocks of 48 tokens hold 1,104 dense ones, and more while chunks of a prompt are compacted.
    chunk = 64
    arguments = ("--kv-prune-prefill", "--max-num-batched-tokens", str(chunk))
    engine = load(
        *EAGER, "--kv-channel-prune", "0.5", "--kv-value-prune", "0.3", *arguments,
        "--max-model-len", "auto", "--no-async-scheduling",
        kv_cache_bytes=24 * 196_608,
    )  # fmt: skip
    longest = engine.max_model_len()
    assert 23 * 48 < longest < 2048
    (prompt,) = random_prompts([longest - 40], seed=3)
    completion = engine.complete(prompt, 40)
    assert len(completion.tokens) == 40
    view = view_of(prompt, completion, BOTH)
    view.chunk_starts = range(0, len(prompt), chunk)
    assert worst(prefix_reference, prompt, completion, view) < TOLERANCE
