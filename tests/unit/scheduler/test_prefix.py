"""What the prefix cache finds, and that the model of the worker notices a cache that is wrong."""

from typing import Any

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_utils import BlockHashListWithBlockSize
from vllm.v1.request import Request

from tests.support.block_engine import BLOCK, NUM_BLOCKS, Engine, make_hasher, make_manager
from tests.support.block_worker import Thin, make_spec
from tests.unit.scheduler.test_manager import WINDOW
from think_vllm.hooks import kv_cache
from think_vllm.scheduler import publisher as publisher_module
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.prefix import LimitedHashes, cache_thin, find_thin, thin_groups
from think_vllm.scheduler.publisher import Publisher
from think_vllm.scheduler.request_state import RequestState

#: Of ``make_spec``: 3 blocks of 4 tokens become 2, and 5 recent tokens stay dense.
SPAN = 12


def make_engine(chunk: int = 100, **changes: Any) -> Engine:
    return Engine(make_spec(observation_window=3, **changes), lag=0, caching=True, chunk=chunk)


def serve(engine: Engine, prompt_len: int, max_tokens: int, tenant: int) -> int:
    """Run a request to its end; return the tokens that it found in the cache."""
    request = engine.arrive(prompt_len, max_tokens, tenant)
    engine.finish()
    assert engine.free_blocks == NUM_BLOCKS - 1
    return engine.hits[engine.name(request)]


def test_thin_spans_of_a_finished_request_are_hit_with_the_dense_blocks_behind() -> None:
    engine = make_engine()
    assert serve(engine, 60, 2, tenant=1) == 0  # (60 - 5) // 12 = 4 thin spans
    # Three quarters are shared: 45 tokens, 3 spans. The 4th holds tokens of the first request.
    assert serve(engine, 60, 2, tenant=1) == 3 * SPAN
    # The 4th span is dense in a request as short as this, but thin in the cache.
    assert serve(engine, 50, 2, tenant=1) == 3 * SPAN


def hit_of_conversation(engine: Engine) -> int:
    """Run a prompt of 40 tokens and 8 of its answer, then both again with a question behind."""
    first = engine.arrive(40, 9, None)
    engine.finish()
    assert first.num_tokens == 48
    following = engine.arrive(40, 1, None)
    replace_prompt(following, [*first.all_token_ids, *range(7000, 7020)])
    engine.finish()
    return engine.hits[engine.name(following)]


def replace_prompt(request: Request, tokens: list[int]) -> None:
    request.prompt_token_ids[:] = request._all_token_ids[:] = tokens
    request.num_prompt_tokens = len(tokens)
    request.block_hashes.clear()
    request.update_block_hashes()


def test_a_conversation_goes_on_where_it_ended() -> None:
    # (48 - 1 - 5) // 12 = 3 thin spans, and the dense blocks behind them.
    assert hit_of_conversation(make_engine()) == 3 * SPAN + 3 * BLOCK


def test_dense_blocks_are_shared_while_their_request_computes_its_prompt() -> None:
    engine = make_engine(chunk=20)
    slow = engine.arrive(90, 2, tenant=1)  # 67 tokens are shared
    engine.step(20)
    engine.step(20)
    follower = engine.arrive(70, 2, tenant=1)
    engine.step(40)  # 40 tokens were scheduled before this step
    assert engine.hits[engine.name(follower)] == 10 * BLOCK
    rows = [engine.manager.get_block_ids(r.request_id)[0] for r in (slow, follower)]
    # The first two blocks of a span are the follower's own, the third is shared.
    shared = [a == b for a, b in zip(rows[0][:10], rows[1][:10], strict=True)]
    assert shared == [False, False, True] * 3 + [False]
    engine.finish()


def test_dense_mode_keeps_exact_copies_of_what_is_compacted() -> None:
    engine = make_engine(thin_prefixes=False, delay_prompt=True)
    assert serve(engine, 40, 8, tenant=1) == 0
    assert serve(engine, 40, 8, tenant=1) == 28  # 30 tokens are shared: 7 blocks
    # The answer was computed over thin spans, so its blocks are not exact.
    assert hit_of_conversation(engine) == 40
    # A prompt of which no token is decoded is never compacted.
    assert serve(engine, 40, 1, tenant=2) == 0
    assert serve(engine, 40, 1, tenant=2) == 28


def test_dense_mode_leaves_copies_out_when_the_pool_is_full() -> None:
    engine = make_engine(thin_prefixes=False, delay_prompt=True)
    others = [engine.arrive(40, 30, None) for _ in range(3)]
    engine.step(40)
    engine.step(40)
    engine.step(40)
    engine.finish()
    assert all(other.is_finished() for other in others)
    assert engine.free_blocks == NUM_BLOCKS - 1


def test_observation_window_is_never_hit() -> None:
    engine = Engine(make_spec(observation_window=9), lag=0, caching=True)
    request = engine.arrive(48, 1, None)
    engine.finish()
    again = engine.arrive(48, 1, None)
    replace_prompt(again, list(request.all_token_ids)[:48])
    engine.finish()
    assert engine.hits[engine.name(again)] == 36  # of 47: at most 48 - 9 tokens, in whole blocks


def test_a_request_that_hit_thin_spans_hits_them_again_after_preemption() -> None:
    engine = make_engine()
    serve(engine, 60, 2, tenant=1)
    request = engine.arrive(60, 20, tenant=1)
    for _ in range(5):
        engine.step(60)
    engine.preempt(0)
    engine.finish()
    assert engine.hits[engine.name(request)] >= 3 * SPAN
    assert engine.hits[engine.name(request)] <= 60 - 3


def test_one_version_of_a_span_is_cached() -> None:
    engine = make_engine()
    both = [engine.arrive(60, 8, tenant=1) for _ in range(2)]
    engine.step(120)  # in one step: neither finds the other's blocks
    engine.finish()
    assert [engine.hits[engine.name(request)] for request in both] == [0, 0]
    pool = engine.manager.block_pool
    spaces = thin_groups(0, make_spec().rule)
    found = [pool.get_cached_block(both[0].block_hashes[2], [space]) for space in spaces]
    versions = {engine.worker.memory[block[0].block_id].version for block in found}
    assert len(versions) == 1
    cached = pool.cached_block_hash_to_block._cache
    assert all(
        not isinstance(entry, dict) for key, entry in cached.items() if key[-4:-2] != b"\0\0"
    )


def test_what_is_left_of_a_version_is_not_found_with_another() -> None:
    spec = make_spec()
    pool, rule = make_manager([spec], True).block_pool, spec.rule
    params = SamplingParams(max_tokens=1)
    request = Request("a", list(range(SPAN)), params, None, block_hasher=make_hasher(BLOCK))
    hashes, old, new = request.block_hashes, pool.get_new_blocks(2), pool.get_new_blocks(2)
    cache_thin(pool, hashes[-1], old, SPAN, 0, rule)
    pool.evict_blocks({old[1].block_id})
    assert find_thin(pool, hashes, SPAN, 0, rule) == []
    cache_thin(pool, hashes[-1], new, SPAN, 0, rule)
    assert find_thin(pool, hashes, SPAN, 0, rule) == [*new, pool.null_block]


def mix_versions(
    pool: Any, block_hash: Any, blocks: Any, tokens: int, group: int, rule: Any
) -> None:
    spaces = thin_groups(group, rule)
    pool.evict_blocks({block.block_id for block in blocks})
    for space, block in zip(spaces, blocks, strict=True):
        # The first block of one version, the second of another.
        if space == spaces[0] or pool.get_cached_block(block_hash, [space]) is None:
            key = kv_cache.block_key(block_hash, space)
            left = pool.get_cached_block(block_hash, [space])
            if left is not None:
                pool.evict_blocks({left[0].block_id})
            kv_cache.cache_block(pool, key, block, tokens)


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (ThinKVCacheManager, "_held_leading_blocks", lambda *_: []),
        (Publisher, "uncache", lambda *_: None),
        (publisher_module, "cache_thin", mix_versions),
    ],
    ids=["shares heads", "leaves heads cached", "mixes versions"],
)
def test_the_model_notices(monkeypatch, owner, name, broken):
    monkeypatch.setattr(owner, name, broken)
    engine = make_engine(chunk=20)

    def run() -> None:
        engine.arrive(90, 2, tenant=1)
        engine.step(20)
        engine.step(20)
        engine.arrive(70, 2, tenant=1)
        engine.step(40)
        engine.finish()
        for round_ in range(12):
            for tenant in (0, 0, 1):
                engine.arrive(40 + round_ % 5 * 8, 3 + round_, tenant)
            for _ in range(6 + round_ % 4):
                engine.step(25)
        engine.finish()

    with pytest.raises(AssertionError):
        run()


def test_preempted_request_hits_no_thin_span_of_its_own() -> None:
    engine = make_engine()
    first = engine.arrive(20, 2)
    engine.finish()
    request = engine.arrive(90, 20)
    replace_prompt(request, [*list(first.prompt_token_ids)[:SPAN], *range(5000, 5078)])
    for _ in range(4):
        engine.step(90)
    assert engine.hits[engine.name(request)] == SPAN
    engine.preempt(0)
    engine.step(90)
    (manager,) = engine.manager.coordinator.single_type_managers
    assert manager._states[request.request_id].cached_spans == 1


def exact_keys_of_thin_blocks(engine: Engine) -> list[int]:
    """Blocks that the worker has made thin, and that the cache of the first group has as exact."""
    cache = engine.manager.block_pool.cached_block_hash_to_block._cache
    found = []
    for key, entry in cache.items():
        blocks = list(entry.values()) if isinstance(entry, dict) else [entry]
        if int.from_bytes(key[-4:], "big") == 0:
            found += [block.block_id for block in blocks]
    return [index for index in found if isinstance(engine.worker.memory.get(index), Thin)]


@pytest.mark.parametrize("hashed", [BLOCK, 2, 1])
@pytest.mark.parametrize("resumed_at", [1, 3, 12])
def test_limits_of_a_resumed_request_hold_whatever_is_hashed(hashed: int, resumed_at: int) -> None:
    spec = make_spec(thin_prefixes=False, delay_prompt=True, observation_window=9)
    engine = Engine(spec, 0, caching=True, others=[WINDOW], num_blocks=80, hashed=hashed)
    request = engine.arrive(42, 30)
    engine.step(42)
    for _ in range(resumed_at):
        engine.step(1)
    engine.preempt(0)
    engine.step(60)
    # Its observation window is computed again; what it has decoded since would be a longer hit.
    assert engine.hits[engine.name(request)] <= 42 - 9
    assert isinstance(request.block_hashes, LimitedHashes)
    engine.finish()


@pytest.mark.parametrize("hashed", [BLOCK, 2, 1])
@pytest.mark.parametrize("viewed", [False, True])
@pytest.mark.parametrize(
    ("max_tokens", "max_spans", "expected"),
    [(None, None, 60), (40, 9, 40), (100, 1, 16), (100, 0, 4), (30, 0, 4), (11, 9, 4)],
)
def test_limits_hold_through_a_view_of_the_hashes(hashed, viewed, max_tokens, max_spans, expected):
    spec = make_spec(observation_window=1)
    pool = make_manager([spec], caching=True).block_pool
    pool.hash_block_size = hashed
    tokens = list(range(64))
    request = Request(
        "r", tokens, SamplingParams(max_tokens=1), None, block_hasher=make_hasher(hashed)
    )
    # Five thin spans, and dense blocks: the first alone, and those that thin spans cut off.
    rows = pool.get_new_blocks(15)
    state = RequestState(rule=spec.rule, request=request)
    publisher = Publisher(pool, 0, spec)
    publisher.publish_thin(state, rows, 5)
    (first, *others) = pool.get_new_blocks(13)
    behind = [None] * 3 + others
    publish_rows(pool, request, [first], 0)
    for row in (3, 9):
        publish_rows(pool, request, [behind[row]], row)
    hashes: Any = request.block_hashes
    if max_tokens is not None and max_spans is not None:
        hashes = LimitedHashes(hashes, max_tokens, max_spans)
    if viewed and hashed < BLOCK:
        hashes = BlockHashListWithBlockSize(hashes, hashed, BLOCK)
    _, found = ThinKVCacheManager.find_longest_cache_hit(
        block_hashes=hashes,
        max_length=63,
        kv_cache_group_ids=[0],
        block_pool=pool,
        kv_cache_spec=spec,
        drop_eagle_block=False,
        alignment_tokens=BLOCK,
    )
    assert found == expected


def publish_rows(pool: Any, request: Request, blocks: list[Any], row: int) -> None:
    """Cache dense blocks, the first of which is in a row."""
    pool.cache_full_blocks(
        request=request,
        blocks=[None] * row + blocks,
        num_cached_blocks=row,
        num_full_blocks=row + len(blocks),
        block_size=BLOCK,
        kv_cache_group_id=0,
    )


def test_resumed_beside_a_window_nothing_thin_is_cached_as_exact() -> None:
    # There vLLM says in whole blocks how far a step gets, and this one compacts within the last.
    spec = make_spec(thin_prefixes=False, delay_prompt=True, observation_window=3)
    engine = Engine(spec, lag=0, caching=True, others=[WINDOW], num_blocks=80)
    engine.arrive(41, 20)
    engine.step(41)
    engine.step(1)
    engine.preempt(0)
    for budget in (60, 1, 1):
        engine.step(budget)
        assert exact_keys_of_thin_blocks(engine) == []


@pytest.mark.parametrize("filler", range(16, 160, 8))
def test_copies_of_a_second_group_are_not_taken_by_the_first(filler: int) -> None:
    spec = make_spec(
        thin_prefixes=False, delay_prompt=True, observation_window=3, span_blocks=4, thin_blocks=3
    )
    engine = Engine(
        spec, 0, caching=True, chunk=400, others=[spec, WINDOW], num_blocks=262, max_len=400
    )
    shared = list(range(192))
    resumed = engine.arrive(252, 50)
    replace_prompt(resumed, [*shared, *range(5000, 5060)])
    while resumed.num_output_tokens < 6:
        engine.step(40)
    engine.preempt(0)
    engine.waiting.clear()
    sharer = engine.arrive(240, 50)
    replace_prompt(sharer, [*shared, *range(9000, 9048)])
    engine.step(4)
    engine.arrive(filler, 50)
    engine.step(3 + filler)
    engine.waiting.append(resumed)
    wanted = engine._wanted
    # The sharer stays in its prompt, as with --long-prefill-token-threshold.
    engine._wanted = lambda x: min(1, wanted(x)) if x is sharer else wanted(x)  # type: ignore[method-assign]
    engine.step(400)
    engine.check_ownership()
